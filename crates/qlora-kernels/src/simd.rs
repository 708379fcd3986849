//! Lets plain loops use the widest vector instructions of the machine they run on.

use std::sync::LazyLock;

static ARCH: LazyLock<pulp::Arch> = LazyLock::new(pulp::Arch::new);

/// Runs `f` compiled for the best instruction set that this CPU has (AVX-512, AVX2 + FMA, or the baseline).
///
/// Only what is inlined into `f` profits: mark the helpers it calls `#[inline(always)]`, and keep the loops in simple,
/// vectorizable form. The compiler never contracts `a * b + c` by itself, so results do not depend on the machine
/// unless `f` says `mul_add`.
#[inline(always)]
pub(crate) fn vectorize<R, F: pulp::NullaryFnOnce<Output = R>>(f: F) -> R {
    ARCH.dispatch(f)
}
