//! The texts of errors: nothing is said twice. The tests of what programs print are those of the command `qlora`.

#[test]
fn nothing_is_said_twice_in_a_chain_of_errors() {
    use qlora::kernels::Error as KernelError;
    use qlora::{core::Error as CoreError, trainer::Error};

    let io = || std::io::Error::new(std::io::ErrorKind::NotFound, "no such thing");
    let core = || CoreError::io("a", io());
    let kernel = || KernelError::Io { op: "read", error: io() };
    let candle = || candle_core::Error::Io(io());
    for error in [
        Error::io("a", io()),
        Error::Core(core()),
        Error::Core(kernel().into()),
        Error::Core(candle().into()),
        Error::Kernel(kernel()),
        Error::Kernel(candle().into()),
        Error::Step { step: 1, micro_batch: 1, source: core() },
        Error::Step { step: 1, micro_batch: 1, source: kernel().into() },
    ] {
        let text = format!("{:?}", anyhow::Error::from(error));
        assert_eq!(text.matches("no such thing").count(), 1, "{text}");
    }
}
