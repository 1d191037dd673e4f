//! What `/proc` reports: pure parsers over text; opening the files is one thin layer.

pub mod capabilities;
pub mod process;
