//! Handles: what the caller owns by a pointer, and frees.

use super::c_tensor::check_pointer;
use super::failure::{Failure, guarded};

/// Makes a handle and writes it to `to`, unless that fails.
///
/// # Safety
/// `to` is null, misaligned, or leads to a pointer that may be written.
pub(super) unsafe fn make<T>(name: &str, to: *mut *mut T, make: impl FnOnce() -> Result<T, Failure>) -> i32 {
    guarded(|| {
        check_pointer(name, to)?;
        let made = Box::new(make()?);
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        unsafe { to.write(Box::into_raw(made)) };
        Ok(())
    })
}

/// Frees a handle, which may be null.
///
/// # Safety
/// `handle` is null, or was made by [`make`] and is not used by any call, now or later.
pub(super) unsafe fn free<T>(handle: *mut T) {
    if !handle.is_null() {
        let free = || {
            // SAFETY: the caller's promise.
            drop(unsafe { Box::from_raw(handle) });
            Ok(())
        };
        guarded(free);
    }
}

/// What a handle leads to.
///
/// # Safety
/// `handle` is null, misaligned, or was made by [`make`], and is neither changed nor freed during `'a`.
pub(super) unsafe fn shared<'a, T>(name: &str, handle: *const T) -> Result<&'a T, Failure> {
    check_pointer(name, handle)?;
    // SAFETY: neither null nor misaligned; the rest is the caller's promise.
    Ok(unsafe { &*handle })
}

/// What a handle leads to, to change it.
///
/// # Safety
/// `handle` is null, misaligned, or was made by [`make`], and is not used otherwise during `'a`.
pub(super) unsafe fn exclusive<'a, T>(name: &str, handle: *mut T) -> Result<&'a mut T, Failure> {
    check_pointer(name, handle)?;
    // SAFETY: neither null nor misaligned; the rest is the caller's promise.
    Ok(unsafe { &mut *handle })
}
