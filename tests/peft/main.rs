//! Adapters and Python's PEFT: files both ways, every kind of adapter, answers of trained ones.

mod kinds;
mod roundtrip;
mod trained_by_peft;
mod trained_here;
