//! What every library needs that is loaded into CRIU. They are built on their own (`build.rs`), without
//! the standard library: they must load into whatever libc CRIU has.

unsafe extern "C" {
    fn abort() -> !;
}

/// Named by the compiled core library, and never called: panics abort.
#[unsafe(no_mangle)]
pub extern "C" fn rust_eh_personality() {}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: it takes nothing and does not return.
    unsafe { abort() }
}
