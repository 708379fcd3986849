//! Configuration, data, optimizer and training loop.
