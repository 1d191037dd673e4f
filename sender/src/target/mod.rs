//! What is known of the target: its processes, mappings, shared segments and files.

pub mod descriptors;
pub mod files;
pub mod process;
pub mod segment;
pub mod smaps;
pub mod tree;
pub mod vma;
