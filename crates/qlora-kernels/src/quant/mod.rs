//! bitsandbytes' 4-bit formats.
