//! Faults at every step of the model of the commit protocol, and at random, against the real programs.

mod places;
mod random;
mod table;
