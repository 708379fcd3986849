//! The memory pool: its limit, its counters, and the devices that are refused.

use std::process::Command;

use candle_core::Device;
use qlora_kernels::{Dtype, Error, Workspace, cuda};

use crate::harness::{gpu, half};

/// Runs this test again, alone in a process of its own: a pool and its counters belong to the process. Returns whether
/// this is that process.
fn alone(test: &str) -> bool {
    const CHILD: &str = "QLORA_TEST_ALONE";
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program).args(["--exact", test, "--nocapture"]).env(CHILD, "1").output().unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    println!("{text}");
    false
}

#[test]
fn a_limit_gives_an_error_that_says_what_to_do() {
    if gpu().is_none() || !alone("memory::a_limit_gives_an_error_that_says_what_to_do") {
        return;
    }
    let device = cuda::device(0, Some(256 << 20)).unwrap();
    let workspace = Workspace::with_dtype(&device, half(&device)).unwrap();
    let pool = workspace.gpu().unwrap().pool();
    assert_eq!(pool.limit(), Some(256 << 20));
    let kept = workspace.zeros(1 << 10, 1 << 15).unwrap();
    let error = workspace.matrix(1 << 13, 1 << 15).unwrap_err();
    println!("{error}");
    let Error::OutOfMemory { requested, used, available, limit, .. } = error else { panic!("{error}") };
    assert_eq!((requested, limit), (512 << 20, Some(256 << 20)));
    assert!((64 << 20..256 << 20).contains(&used), "{used} bytes used");
    assert!(available <= (256 << 20) - used, "{available} bytes available");
    let text = error.to_string();
    for part in ["0.537 GB more", "0.27 GB that were allowed", "gradient checkpointing"] {
        assert!(text.contains(part), "{text}");
    }
    // An allocation that fits still works, and candle's memory comes from the same pool.
    drop(workspace.zeros(1 << 10, 1 << 15).unwrap());
    let refused = candle_core::Tensor::zeros(512 << 20, candle_core::DType::U8, &device);
    assert!(refused.is_err());
    assert!(kept.to_vec().unwrap().iter().all(|&x| x == 0.0));
    // The same memory again and again does not use the limit up.
    for _ in 0..50 {
        drop(workspace.matrix(1 << 11, 1 << 14).unwrap());
    }
}

#[test]
fn devices_of_one_gpu_report_the_pool_that_their_memory_comes_from() {
    if gpu().is_none() || !alone("memory::devices_of_one_gpu_report_the_pool_that_their_memory_comes_from") {
        return;
    }
    const MIB: u64 = 1 << 20;
    let open = |limit| Workspace::with_dtype(&cuda::device(0, limit).unwrap(), Dtype::F16).unwrap();
    let first = open(None);
    assert_eq!(first.gpu().unwrap().pool().limit(), None);
    let second = open(Some(256 * MIB));
    let third = open(None);
    third.gpu().unwrap().synchronize("test").unwrap();
    let before = third.gpu().unwrap().pool().used().unwrap();
    let kept = third.matrix(64, 1 << 19).unwrap();
    for workspace in [&first, &second, &third] {
        let pool = workspace.gpu().unwrap().pool();
        assert_eq!(pool.limit(), Some(256 * MIB));
        assert_eq!(pool.used().unwrap(), before + 64 * MIB);
        assert!(pool.available().unwrap() <= 192 * MIB);
        assert!(workspace.matrix(256, 1 << 19).is_err(), "the limit holds for the process");
    }
    drop(kept);
}

#[test]
fn the_peak_is_the_most_bytes_in_use_at_one_time() {
    if gpu().is_none() || !alone("memory::the_peak_is_the_most_bytes_in_use_at_one_time") {
        return;
    }
    let device = gpu().unwrap();
    let workspace = Workspace::with_dtype(&device, half(&device)).unwrap();
    let pool = workspace.gpu().unwrap().pool();
    const MIB: u64 = 1 << 20;
    let matrix = |mib: usize| workspace.matrix(mib, 1 << 19).unwrap();
    let settle = || workspace.gpu().unwrap().synchronize("test").unwrap();
    settle();
    let before = pool.used().unwrap();
    let first = matrix(100);
    drop(matrix(300));
    settle();
    assert_eq!(pool.used().unwrap(), before + 100 * MIB);
    assert_eq!(pool.peak().unwrap(), before + 400 * MIB);
    assert_eq!(workspace.peak_bytes() as u64, before + 400 * MIB);
    pool.reset_peak().unwrap();
    assert_eq!(pool.peak().unwrap(), before + 100 * MIB);
    drop(matrix(50));
    settle();
    assert_eq!(pool.peak().unwrap(), before + 150 * MIB);
    assert!(pool.reserved().unwrap() >= before + 400 * MIB, "freed memory stays in the pool");
    drop(first);
    settle();
    workspace.trim();
    assert!(pool.reserved().unwrap() < before + 100 * MIB, "trimming gives memory back");
    assert!(pool.available().unwrap() > 0);
}

#[test]
fn memory_that_does_not_exist_is_refused_with_its_size() {
    let Some(device) = gpu() else { return };
    let workspace = Workspace::with_dtype(&device, Dtype::F32).unwrap();
    let error = workspace.matrix(1 << 20, 1 << 20).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { requested, limit: None, .. } if requested == 1 << 42), "{error}");
    assert!(error.to_string().contains("4398.047 GB more"), "{error}");
    // The context is not lost.
    assert_eq!(workspace.zeros(2, 2).unwrap().to_vec().unwrap(), [0.0; 4]);
}

#[test]
fn the_default_device_of_candle_is_refused() {
    if gpu().is_none() {
        return;
    }
    let device = Device::new_cuda(0).unwrap();
    let error = Workspace::new(&device).unwrap_err().to_string();
    assert!(error.contains("default stream") && error.contains("cuda::device"), "{error}");
    let device = Device::new_cuda_with_stream(0).unwrap();
    let workspace = Workspace::new(&device).unwrap();
    assert_eq!(workspace.zeros(1, 3).unwrap().to_vec().unwrap(), [0.0; 3]);
    assert_eq!(workspace.dtype(), half(&device));
    let error = cuda::device(999, None).unwrap_err().to_string();
    assert!(error.contains("GPU 999 cannot be used: there is no GPU with this number"), "{error}");
}

/// With `QLORA_DEVICE_LIMITS=7.5`, or on such a card, there is no bf16; elsewhere nothing is refused.
#[test]
fn what_a_gpu_cannot_compute_in_is_refused_by_name() {
    let Some(device) = gpu() else { return };
    let gpu = cuda::Gpu::of(&device).unwrap();
    println!("{}: {}", gpu.name(), gpu.limits());
    assert!(gpu.limits().capability >= (8, 0) || !gpu.limits().has_bf16());
    for dtype in [Dtype::F32, Dtype::F16] {
        assert_eq!(Workspace::with_dtype(&device, dtype).unwrap().dtype(), dtype);
    }
    match Workspace::with_dtype(&device, Dtype::Bf16) {
        Ok(_) => assert!(gpu.limits().has_bf16()),
        Err(error) => {
            let error = error.to_string();
            assert!(!gpu.limits().has_bf16(), "{error}");
            assert!(error.contains("cannot compute in bfloat16") && error.contains("float16"), "{error}");
        }
    }
    assert_eq!(Workspace::new(&device).unwrap().dtype(), half(&device));
}

#[test]
fn two_devices_are_not_mixed_up() {
    let Some(device) = gpu() else { return };
    let layout = qlora_kernels::SequenceLayout::from_lengths(&[3]);
    let table = qlora_kernels::ops::rope::RopeTable::new(
        &qlora_kernels::ops::rope::RopeConfig { theta: 1e4, scaling: None },
        8,
        16,
    )
    .unwrap();
    let rotate = |device: &Device| {
        let workspace = Workspace::with_dtype(device, Dtype::F32).unwrap();
        let mut x = workspace.zeros(3, 8).unwrap();
        qlora_kernels::ops::rope::forward(x.view_mut(), 8, &table, layout.positions())
    };
    rotate(&device).unwrap();
    let error = rotate(&cuda::device(0, None).unwrap()).unwrap_err().to_string();
    assert!(error.contains("used on another GPU before"), "{error}");
}
