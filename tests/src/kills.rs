//! When something is killed, and how often.

/// How often: this, or `PAGEFERRY_KILLS`.
///
/// # Panics
/// If that is no number.
#[must_use]
pub fn kills(default: u32) -> u32 {
    std::env::var("PAGEFERRY_KILLS")
        .map_or(default, |n| n.parse().expect("PAGEFERRY_KILLS is a number"))
}

/// A number between 0 and 1 that differs from call to call, the same in every run.
#[must_use]
pub fn spread(step: u32) -> f64 {
    f64::from(step) * 0.618_033_988_749_895 % 1.0
}
