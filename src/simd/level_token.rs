//! The macros of a level's file: `level!` makes the token that proves the level's instructions, `op!` relies on it.

/// Makes the token of a level, its detection, and the function through which kernels and parts enter it, from one list of features.
///
/// * `$detect`: the macro of `std::arch` that detects a feature on this architecture
/// * `fn $enter<K: $kernel>(work, token) call`: the function that enters the level, and the call that it makes
macro_rules! level {
    (
        $(#[$doc:meta])*
        $token:ident = $detect:ident($($feature:tt),+ $(,)?)
        fn $enter:ident<K: $kernel:path>($work:ident, $proof:ident) $call:block
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) struct $token(());

        impl $token {
            pub(in crate::simd) fn detect() -> Option<Self> {
                ($($detect!($feature))&&+).then_some(Self(()))
            }

            /// Runs a kernel or a part compiled with the level's instructions.
            #[inline]
            pub(in crate::simd) fn $enter<K: $kernel>(self, kernel: K) -> K::Output {
                $(#[target_feature(enable = $feature)])+
                #[inline(never)] // or parts would be compiled into each kernel that calls them
                fn shim<K: $kernel>($work: K, $proof: $token) -> K::Output $call
                // SAFETY: `self` exists, so `detect` found every one of the features that `shim` enables.
                unsafe { shim(kernel, self) }
            }
        }

        impl $crate::simd::level_token::Token for $token {}
    };
}
pub(super) use level;

/// A token that [`level!`] made. A value exists only if the processor has the level's features.
pub(super) trait Token {}

/// Instructions of the level of `$token` that do not access memory: `op!(self, _mm256_add_ps(a, b))`.
macro_rules! op {
    ($token:expr, $($call:tt)+) => {{
        fn proven(_: impl $crate::simd::level_token::Token) {}
        proven($token);
        // SAFETY: the intrinsics in an `op!` are unsafe for one reason: the processor must have their features. `$token` is a
        // level's token, so all features of its list were detected, and those that they imply. Each intrinsic needs one of them.
        // None of them reads or writes memory (a prefetch takes any address, a fence takes none).
        unsafe { $($call)+ }
    }};
}
pub(super) use op;
