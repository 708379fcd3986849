//! NCCL, as far as one GPU shows it: the library is found and connected, and a sum over one process is what was there.

use qlora_kernels::cuda::nccl::{Nccl, describe, new_id};
use qlora_kernels::{Dtype, Workspace};

use crate::harness::gpu;

#[test]
fn a_sum_over_one_process_changes_nothing() {
    let Some(device) = gpu() else { return };
    match describe() {
        Ok(library) => println!("{library}"),
        Err(error) => {
            assert!(std::env::var("QLORA_REQUIRE_NCCL").is_err(), "{error}");
            println!("left out: {error}");
            return;
        }
    }
    let workspace = Workspace::with_dtype(&device, Dtype::F32).unwrap();
    let mut nccl = Nccl::join(&device, new_id().unwrap(), 0, 1, &|| Ok(())).unwrap();
    let numbers: Vec<f32> = (0..1_000_003).map(|i| i as f32 * 0.37 - 5.0).collect();
    for len in [1, 7, numbers.len()] {
        let mut values = workspace.zeros_f32(1, len).unwrap();
        values.view_mut().copy_from(qlora_kernels::View::vector(&numbers[..len])).unwrap();
        nccl.sum(values.view_mut(), &|| Ok(())).unwrap();
        assert!(values.to_vec().unwrap() == numbers[..len]);
    }
    // A partner that never comes is given up.
    let started = std::time::Instant::now();
    let give_up = || if started.elapsed().as_secs() < 2 { Ok(()) } else { Err("nobody came".to_owned()) };
    let alone = Nccl::join(&device, new_id().unwrap(), 0, 2, &give_up);
    let text = alone.unwrap_err().to_string();
    assert!(text.contains("nobody came"), "{text}");
    assert!(started.elapsed().as_secs() < 30, "giving up took {:?}", started.elapsed());
}
