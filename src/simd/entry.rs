//! How a kernel enters a level.
//!
//! A [`Kernel`](crate::simd::Kernel) is compiled once for every level, inside the function that enables the level's instructions
//! ([`level!`](crate::simd::level_token::level)). Everything that it calls is `#[inline(always)]`, so it is compiled there, too,
//! or is a [`Part`](crate::simd::Part), which is compiled in such a function of its own.
//! Kernels use loops and functions, not closures, because a closure that the compiler leaves out of line is compiled without the
//! level's instructions.

/// Makes, from a function that is generic over the level, the function that enters the level:
///
/// ```text
/// kernel! {
///     pub(crate) fn double<'a, S: Simd>(simd: S, x: &'a mut [f32]) { double_vectors(simd, x) }
/// }
/// ```
///
/// becomes `pub(crate) fn double<'a>(isa: Isa, x: &'a mut [f32])`. The arguments are the fields of a struct, which is the
/// [`Kernel`](crate::simd::Kernel), so their lifetimes must have names. With a parameter `D: PairDots` after `S` and an argument
/// `dots: D` after `simd`, the struct is a [`PairKernel`](crate::simd::bf16_dot::PairKernel). A body of more than a few lines
/// should be a function of its own, marked `#[inline(always)]`.
///
/// Loops that fill every register implement [`Kernel`](crate::simd::Kernel) themselves: the arguments of this macro become
/// variables, which a loop then has to spill (see the `AddValues` of prefill and of decode).
macro_rules! kernel {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$($life:lifetime,)* $s:ident: Simd>($simd:ident: $_s:ty $(, $arg:ident: $type:ty)* $(,)?)
        $(-> $output:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name<$($life),*>(isa: $crate::simd::Isa $(, $arg: $type)*) $(-> $output)? {
            struct Arguments<$($life),*> {
                $($arg: $type,)*
            }
            impl<$($life),*> $crate::simd::Kernel for Arguments<$($life),*> {
                type Output = $crate::simd::kernel!(@output $($output)?);

                #[inline(always)]
                fn run<$s: $crate::simd::Simd>(self, $simd: $s) -> Self::Output {
                    let Arguments { $($arg),* } = self;
                    $body
                }
            }
            isa.run(Arguments { $($arg),* })
        }
    };
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$($life:lifetime,)* $s:ident: Simd, $d:ident: PairDots>(
            $simd:ident: $_s:ty, $dots:ident: $_d:ty $(, $arg:ident: $type:ty)* $(,)?
        )
        $(-> $output:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name<$($life),*>(isa: $crate::simd::Isa $(, $arg: $type)*) $(-> $output)? {
            struct Arguments<$($life),*> {
                $($arg: $type,)*
            }
            impl<$($life),*> $crate::simd::PairKernel for Arguments<$($life),*> {
                type Output = $crate::simd::kernel!(@output $($output)?);

                #[inline(always)]
                fn run<$s: $crate::simd::Simd>(self, $simd: $s, $dots: impl $crate::simd::PairDots<$s>) -> Self::Output {
                    let Arguments { $($arg),* } = self;
                    $body
                }
            }
            isa.run_pairs(Arguments { $($arg),* })
        }
    };
    (@output) => { () };
    (@output $output:ty) => { $output };
}
pub(crate) use kernel;
