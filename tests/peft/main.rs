//! Adapters and Python's PEFT: files both ways, every kind of adapter, answers of trained ones.

#[path = "../common/mod.rs"]
mod common;
mod dora;
mod kinds;
mod replaced;
mod roundtrip;
mod step;
mod trained_by_peft;
mod trained_here;
