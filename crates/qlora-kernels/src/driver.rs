//! Whether the NVIDIA driver is new enough for the CUDA toolkit that a program was built with, in words.
//!
//! Within a major version of CUDA, compiled code runs on every driver of that version; intermediate code (PTX), which candle's kernels
//! are stored as, needs the driver of the very version that it was made with. So that one counts.

/// The toolkit's version and the oldest driver for Linux that takes its PTX.
///
/// Source: CUDA Toolkit Release Notes, "CUDA Toolkit and Corresponding Driver Versions".
const DRIVERS: &[((u32, u32), &str)] = &[
    ((11, 8), "520.61"),
    ((12, 0), "525.60"),
    ((12, 1), "530.30"),
    ((12, 2), "535.54"),
    ((12, 3), "545.23"),
    ((12, 4), "550.54"),
    ((12, 5), "555.42"),
    ((12, 6), "560.28"),
    ((12, 8), "570.26"),
    ((12, 9), "575.51"),
    ((13, 0), "580.65"),
];

/// A version as CUDA writes it: 13000 is 13.0.
pub(crate) fn cuda_version(number: u32) -> (u32, u32) {
    (number / 1000, number % 1000 / 10)
}

/// The oldest driver for programs that were built with this version of CUDA.
pub(crate) fn oldest_driver((major, minor): (u32, u32)) -> String {
    // The nearest older version that is known, of the same major version.
    let known = DRIVERS.iter().rev().find(|&&((a, b), _)| a == major && b <= minor);
    match known {
        Some(((_, at), driver)) if *at == minor => (*driver).to_owned(),
        Some((_, driver)) => format!("the one of CUDA {major}.{minor}, newer than {driver}"),
        None => format!("the one of CUDA {major}.{minor}"),
    }
}

/// Whether a status says that the driver is too old: `CUDA_ERROR_UNSUPPORTED_PTX_VERSION`, `CUDA_ERROR_SYSTEM_DRIVER_MISMATCH`,
/// `cudaErrorInsufficientDriver`.
pub(crate) fn is_too_old(code: i32) -> bool {
    matches!(code, 35 | 222 | 803)
}

/// The number of the kernel's driver in the text of `/proc/driver/nvidia/version`.
pub(crate) fn driver_number(text: &str) -> Option<&str> {
    let line = text.lines().find(|line| line.starts_with("NVRM version"))?;
    let is_number = |word: &&str| word.split('.').count() >= 2 && word.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    line.split_whitespace().find(is_number)
}

/// The error message for a driver that is too old: which it is (its number and the CUDA version it supports, where
/// known), which is needed, and what to do. `built` is the CUDA version of the program.
pub(crate) fn too_old(number: Option<&str>, supports: Option<(u32, u32)>, built: (u32, u32)) -> String {
    let version = |(major, minor)| format!("CUDA {major}.{minor}");
    let found = match (number, supports) {
        (Some(number), Some(supports)) => format!("{number} ({})", version(supports)),
        (Some(number), None) => number.to_owned(),
        (None, Some(supports)) => format!("one for {}", version(supports)),
        (None, None) => "of an unknown version".to_owned(),
    };
    format!(
        "the NVIDIA driver is too old: found {found}, this program was built with {} and needs {} or newer. Update the driver; \
         where that is not possible, use a build with an older CUDA toolkit (book/src/guide/cuda-builds.md lists the builds and their drivers)",
        version(built),
        oldest_driver(built)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_says_what_is_there_what_is_needed_and_what_to_do() {
        let message = too_old(Some("550.54.15"), Some((12, 4)), cuda_version(13_000));
        for part in
            ["found 550.54.15 (CUDA 12.4)", "built with CUDA 13.0", "needs 580.65 or newer", "older CUDA toolkit"]
        {
            assert!(message.contains(part), "{part:?} is not in {message}");
        }
        assert!(
            too_old(None, None, (11, 8)).contains("unknown version") && too_old(None, None, (11, 8)).contains("520.61")
        );
        assert!(too_old(None, Some((11, 4)), (12, 4)).contains("found one for CUDA 11.4"));
    }

    #[test]
    fn versions_that_are_not_in_the_table_are_not_made_up() {
        assert_eq!(cuda_version(12_080), (12, 8));
        assert_eq!(oldest_driver((12, 4)), "550.54");
        assert_eq!(oldest_driver((13, 2)), "the one of CUDA 13.2, newer than 580.65");
        assert_eq!(oldest_driver((14, 0)), "the one of CUDA 14.0");
    }

    #[test]
    fn statuses_and_numbers_are_recognized() {
        assert!([35, 222, 803].into_iter().all(is_too_old));
        assert!(![0, 2, 98, 209, 700].into_iter().any(is_too_old));
        let text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  gcc 12";
        assert_eq!(driver_number(text), Some("550.54.15"));
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n";
        assert_eq!(driver_number(open), Some("580.159.04"));
        assert_eq!(driver_number("GCC version: gcc 12.2"), None);
    }
}
