//! Libraries that are opened at run time: their folders, and tables of their functions.

use std::path::PathBuf;

use crate::libraries::LibrarySearch;

/// The folders in which a library of NVIDIA's may lie; `package` is its folder among Python's packages (`nvidia/<package>/lib`).
pub(super) fn folders(package: &str) -> Vec<PathBuf> {
    LibrarySearch::of_this_process().folders(package)
}

/// A struct of C functions that are looked up by their symbols in a library that was opened at run time. Whoever writes a
/// table vouches that each symbol is a function with exactly the signature that stands behind it.
macro_rules! function_table {
    (
        $(#[$doc:meta])*
        struct $name:ident;
        $($field:ident : $symbol:literal = fn($($arg:ty),*) -> $ret:ty;)*
    ) => {
        $(#[$doc])*
        pub(super) struct $name {
            /// Path or name that the library was opened by.
            pub(super) path: String,
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> $ret,)*
        }

        impl $name {
            fn resolve(library: &Library, path: String) -> std::result::Result<Self, libloading::Error> {
                Ok(Self {
                    path,
                    $($field: {
                        // SAFETY: the symbol is a C function with exactly this signature: the table says so.
                        let symbol = unsafe {
                            library.get::<unsafe extern "C" fn($($arg),*) -> $ret>(concat!($symbol, "\0").as_bytes())?
                        };
                        *symbol
                    },)*
                })
            }
        }
    };
}
pub(super) use function_table;
