//! NCCL, as far as one GPU shows it: the library is found and connected, and a sum over one process is what was there. With two GPUs
//! also exchanges, of threads that have one each.

use qlora_kernels::cuda::nccl::{Nccl, describe, new_id};
use qlora_kernels::cuda::{device, device_count};
use qlora_kernels::{Dtype, Matrix, View, Workspace};

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

/// What a rank sends in a round, in numbers that bf16 has.
fn sent(rank: usize, round: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7 + 31 * rank + 101 * round) % 251) as f32).collect()
}

#[test]
fn matrices_go_to_every_process() {
    let Some(_) = gpu() else { return };
    if device_count() < 2 || describe().is_err() {
        println!("left out: it takes two GPUs and NCCL");
        return;
    }
    const COLS: usize = 24;
    // Of either rank: few rows, none, and many.
    let rounds = [[5, 7], [0, 3], [1, 0], [400_000, 300_001], [2, 2]];
    let id = new_id().unwrap();
    std::thread::scope(|scope| {
        for rank in 0..2 {
            scope.spawn(move || {
                let other = 1 - rank;
                let workspace = Workspace::with_dtype(&device(rank, None).unwrap(), Dtype::Bf16).unwrap();
                let mut nccl = Nccl::join(&workspace.device(), id, rank, 2, &|| Ok(())).unwrap();
                let mut received = Vec::new();
                for (round, rows) in rounds.iter().enumerate() {
                    let mut own = workspace.matrix(rows[rank], COLS).unwrap();
                    let values = sent(rank, round, rows[rank] * COLS);
                    own.view_mut().copy_from(View::new(&values, rows[rank], COLS)).unwrap();
                    let mut theirs = workspace.matrix(rows[other], COLS).unwrap();
                    let (empty, mut nothing) = (workspace.matrix(0, COLS).unwrap(), workspace.matrix(0, COLS).unwrap());
                    let mut outgoing = vec![own.view(), empty.view()];
                    let mut incoming = vec![theirs.view_mut(), nothing.view_mut()];
                    if rank == 0 {
                        outgoing.swap(0, 1);
                        incoming.swap(0, 1);
                    }
                    nccl.all_to_all(&outgoing, incoming, &|| Ok(())).unwrap();
                    // Nothing waits: the memory that is sent is freed in the order of the stream.
                    drop((own, empty, nothing));
                    received.push(theirs);
                }
                for (round, theirs) in received.iter().enumerate() {
                    let expected = sent(other, round, rounds[round][other] * COLS);
                    assert!(theirs.to_vec().unwrap() == expected, "rank {rank}, round {round}");
                }
                let gaps: Matrix = workspace.matrix(4, 2 * COLS).unwrap();
                let error = nccl.all_to_all(&[gaps.view().slice_cols(0..COLS)], Vec::new(), &|| Ok(())).unwrap_err();
                assert!(error.to_string().contains("1 and 0 matrices for 2 processes"), "{error}");
            });
        }
    });
}
