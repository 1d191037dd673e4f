//! Number and times of the kills in a test.

/// Returns the number of kills: `PAGEFERRY_KILLS`, or this default.
///
/// # Panics
/// If the variable is not a number.
#[must_use]
pub fn kills(default: u32) -> u32 {
    std::env::var("PAGEFERRY_KILLS")
        .map_or(default, |n| n.parse().expect("PAGEFERRY_KILLS is a number"))
}

/// Returns a number between 0 and 1 that differs from step to step and is the same in every run.
#[must_use]
pub fn spread(step: u32) -> f64 {
    f64::from(step) * 0.618_033_988_749_895 % 1.0
}
