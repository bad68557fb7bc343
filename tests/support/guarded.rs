//! Memory between two guard pages, and a note of the current case, printed when a guard page is touched.

use std::cell::RefCell;
use std::marker::PhantomData;

/// Where in the memory a buffer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its first byte behind the guard page in front.
    Start,
    /// Its last byte before the guard page at the end.
    End,
}

/// Some pages that can be read and written, with a page that can't on either side.
pub struct Guarded {
    first: *mut u8,
    bytes: usize,
    page: usize,
    owner: PhantomData<Box<[u8]>>,
}

impl Guarded {
    /// At least `bytes` bytes.
    pub fn new(bytes: usize) -> Self {
        // SAFETY: returns a number and touches no memory of ours.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let bytes = bytes.next_multiple_of(page);
        let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
        // SAFETY: maps fresh memory, at an address that the system chooses.
        let all = unsafe { libc::mmap(std::ptr::null_mut(), bytes + 2 * page, read_write, private, -1, 0) };
        assert!(all != libc::MAP_FAILED);
        let all = all.cast::<u8>();
        let first = all.wrapping_add(page);
        for guard in [all, first.wrapping_add(bytes)] {
            // SAFETY: a page of the memory just mapped, to which there is no other pointer yet.
            assert_eq!(unsafe { libc::mprotect(guard.cast(), page, libc::PROT_NONE) }, 0);
        }
        Guarded { first, bytes, page, owner: PhantomData }
    }

    /// A copy of `data`, flush with the guard page of `side`.
    pub fn place<T: Copy>(&mut self, data: &[T], side: Side) -> &mut [T] {
        let size = size_of_val(data);
        assert!(size <= self.bytes && self.page.is_multiple_of(size_of::<T>()));
        let at = match side {
            Side::Start => self.first,
            Side::End => self.first.wrapping_add(self.bytes - size),
        };
        let at = at.cast::<T>();
        // SAFETY: inside the pages (asserted), aligned because a page is a multiple of the type's size, ours alone for as
        // long as `self` is borrowed, and filled with valid elements before it is looked at.
        unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), at, data.len());
            std::slice::from_raw_parts_mut(at, data.len())
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: what `new` has mapped; every borrow of it has ended.
        unsafe { libc::munmap(self.first.wrapping_sub(self.page).cast(), self.bytes + 2 * self.page) };
    }
}

thread_local! {
    static CASE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Notes the case that this thread is about to try. If it touches a guard page, the note is what it leaves behind.
pub fn note(case: std::fmt::Arguments<'_>) {
    static HANDLER: std::sync::Once = std::sync::Once::new();
    HANDLER.call_once(|| {
        for signal in [libc::SIGSEGV, libc::SIGBUS] {
            // SAFETY: the handler only writes memory that is already there, and then lets the signal take its course.
            unsafe { libc::signal(signal, tell as *const () as libc::sighandler_t) };
        }
    });
    CASE.with_borrow_mut(|note| {
        note.clear();
        std::fmt::Write::write_fmt(note, case).unwrap();
    });
}

extern "C" fn tell(signal: libc::c_int) {
    let _ = CASE.try_with(|case| {
        if let Ok(case) = case.try_borrow() {
            for text in ["out of bounds: ", case.as_str(), "\n"] {
                // SAFETY: writes a string that is there.
                unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
            }
        }
    });
    // SAFETY: back to what the signal does by itself; the access is tried again and ends the process.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}
