//! Lets plain loops use the widest vector instructions of the machine they run on.

use std::sync::LazyLock;

static ARCH: LazyLock<pulp::Arch> = LazyLock::new(pulp::Arch::new);

/// Runs `f` compiled for the best instruction set that this CPU has (AVX-512, AVX2 + FMA, or the baseline).
///
/// Only what is inlined into `f` profits: mark `f` itself and the helpers it calls `#[inline(always)]`, and keep the loops
/// in simple, vectorizable form. Make `f` a `move` closure if it captures scalars: behind a reference, the compiler has
/// to prove that the loop does not write to them. The compiler never contracts `a * b + c` by itself, so results do not
/// depend on the machine unless `f` says `mul_add`. Write `for` loops: a closure given to `for_each` or `fold` is inlined
/// only if the compiler finds it small.
///
/// The bound is `FnMut` because calling a closure as `FnOnce` goes through a shim that does not inherit
/// `#[inline(always)]`: a large `f` would silently stay compiled for the baseline. Where the compiler complains that `f`
/// is only `FnOnce`, reborrow what it consumes (`y.iter_mut()` instead of `y`).
#[inline(always)]
pub(crate) fn vectorize<R, F: FnMut() -> R>(f: F) -> R {
    struct Op<F>(F);
    impl<R, F: FnMut() -> R> pulp::NullaryFnOnce for Op<F> {
        type Output = R;

        #[inline(always)]
        fn call(mut self) -> R {
            (self.0)()
        }
    }
    ARCH.dispatch(Op(f))
}
