use std::sync::mpsc;

use super::*;

/// A free port: the system's choice, given back.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn ranks(rank: usize, size: usize, port: u16) -> Ranks {
    Ranks {
        place: RankPlace { rank, size, local_rank: rank },
        address: "127.0.0.1".to_owned(),
        port,
        store: false,
        job: "test".to_owned(),
        launcher: "a test",
    }
}

fn options() -> TcpOptions {
    TcpOptions { patience: Duration::from_secs(20), ..TcpOptions::default() }
}

/// Runs `work` on `size` ranks, each a thread; their results in order.
fn on_ranks<T: Send>(size: usize, work: impl Fn(&mut Tcp) -> T + Sync) -> Vec<T> {
    let port = free_port();
    std::thread::scope(|scope| {
        let start = |rank| {
            let work = &work;
            scope.spawn(move || work(&mut Tcp::connect(&ranks(rank, size, port), &options()).unwrap()))
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn messages_arrive_in_the_order_of_the_ranks() {
    for size in 2..5 {
        let all = on_ranks(size, |comm| {
            let mine = vec![comm.rank() as u8; 3 * comm.rank()];
            let gathered = comm.gather("a test", mine).unwrap();
            let again = comm.gather("another", b"x".to_vec()).unwrap();
            comm.leave();
            (gathered, again, comm.describe().unwrap())
        });
        let expected: Vec<Vec<u8>> = (0..size).map(|rank| vec![rank as u8; 3 * rank]).collect();
        for (gathered, again, described) in all {
            assert_eq!(gathered, expected);
            assert_eq!(again, vec![b"x".to_vec(); size]);
            assert!(described.starts_with(&format!("{size} ranks: {size} on ")), "{described}");
        }
    }
}

#[test]
fn everybody_gets_what_each_sends_it() {
    let content = |from: usize, to: usize, round: usize| vec![(16 * from + to) as u8; (from + 3 * to + round) * 10_000];
    for size in 2..5 {
        on_ranks(size, |comm| {
            let own = comm.rank();
            for round in 0..3 {
                let parts = (0..size).map(|to| content(own, to, round)).collect();
                let received = comm.all_to_all("parts", parts).unwrap();
                let expected: Vec<_> = (0..size).map(|from| content(from, own, round)).collect();
                assert!(received == expected, "rank {own} of {size}");
            }
            comm.leave();
        });
    }
}

#[test]
fn sums_have_the_bits_of_an_addition_in_order() {
    // Three values whose sum depends on the order.
    let value = |rank: usize, i: usize| [1e8, 1.0, -1e8][(rank + i) % 3] * (1.0 + i as f32 * 1e-3);
    const LEN: usize = 100_003;
    for size in [2, 3, 4] {
        let expected: Vec<f32> =
            (0..LEN).map(|i| (1..size).fold(value(0, i), |sum, rank| sum + value(rank, i))).collect();
        let sums = on_ranks(size, |comm| {
            let mut values: Vec<f32> = (0..LEN).map(|i| value(comm.rank(), i)).collect();
            for _ in 0..2 {
                values = (0..LEN).map(|i| value(comm.rank(), i)).collect();
                comm.sum("values", ViewMut::vector(&mut values)).unwrap();
            }
            comm.leave();
            values
        });
        for sum in sums {
            assert!(sum.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
}

#[test]
fn ranks_at_different_places_of_the_program_find_out() {
    let errors = on_ranks(2, |comm| {
        let what = if comm.rank() == 0 { "evaluation" } else { "step" };
        let error = comm.gather(what, Vec::new()).unwrap_err().to_string();
        comm.fail(&error);
        error
    });
    assert!(errors[0].contains("rank 1 is elsewhere in the program"), "{errors:?}");
    assert!(errors[0].contains("(step)") && errors[0].contains("(evaluation)"), "{errors:?}");
    assert!(errors[1].starts_with("rank 0 "), "{errors:?}");
}

#[test]
fn everybody_is_told_who_failed_and_why() {
    let errors = on_ranks(4, |comm| {
        if comm.rank() == 2 {
            comm.fail("failed: the disk is full");
            return String::new();
        }
        comm.gather("step", Vec::new()).unwrap_err().to_string()
    });
    for rank in [0, 1, 3] {
        assert_eq!(errors[rank], "rank 2 failed: the disk is full; this rank had not begun its first step");
    }
}

#[test]
fn a_rank_that_ends_without_a_word_is_named_by_all() {
    let errors = on_ranks(3, |comm| {
        if comm.rank() == 1 {
            // As the end of a process: the kernel closes what it had open.
            comm.shared.left.store(true, Ordering::SeqCst);
            comm.lines[0].handle().close();
            return String::new();
        }
        comm.gather("step", Vec::new()).unwrap_err().to_string()
    });
    for rank in [0, 2] {
        assert!(errors[rank].starts_with("rank 1 (process "), "{errors:?}");
        assert!(errors[rank].contains("ended or was killed"), "{errors:?}");
    }
}

#[test]
fn who_does_not_notice_is_told() {
    let (sender, told) = mpsc::channel();
    let sender = Mutex::new(sender);
    let port = free_port();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let comm = Tcp::connect(&ranks(1, 2, port), &options()).unwrap();
            drop(comm);
        });
        let when_lost = Arc::new(move |error: &Error| sender.lock().unwrap().send(error.to_string()).unwrap());
        let comm = Tcp::connect(&ranks(0, 2, port), &TcpOptions { when_lost, ..options() }).unwrap();
        // Busy with a step that takes long.
        let text = told.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(text, "rank 1 ended before the run did; this rank had not begun its first step");
        assert_eq!(comm.check().unwrap_err().to_string(), text);
    });
}

#[test]
fn who_does_not_belong_is_refused() {
    // A twin.
    let port = free_port();
    let results: Vec<_> = std::thread::scope(|scope| {
        let connect = |rank: usize, size: usize, job: &'static str| {
            scope.spawn(move || {
                let mut ranks = ranks(rank, size, port);
                ranks.job = job.to_owned();
                Tcp::connect(&ranks, &options()).map(|_| ()).map_err(|error| error.to_string())
            })
        };
        let threads = [connect(0, 3, "test"), connect(1, 3, "test"), connect(1, 3, "test")];
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(
        results.iter().all(|result| result.as_ref().unwrap_err().contains("say that they are rank 1")),
        "{results:?}"
    );

    // Who counts otherwise.
    let port = free_port();
    let results: Vec<_> = std::thread::scope(|scope| {
        let connect = |rank: usize, size: usize| {
            scope.spawn(move || {
                Tcp::connect(&ranks(rank, size, port), &options()).map(|_| ()).map_err(|error| error.to_string())
            })
        };
        let threads = [connect(0, 2), connect(1, 4)];
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(results.iter().all(|result| result.as_ref().unwrap_err().contains("disagree on how many")), "{results:?}");
}

#[test]
fn strangers_on_the_port_disturb_nobody() {
    use std::io::Write as _;
    let port = free_port();
    std::thread::scope(|scope| {
        let first = scope.spawn(move || {
            let mut comm = Tcp::connect(&ranks(0, 2, port), &options()).unwrap();
            let all = comm.gather("hello", vec![1]).unwrap();
            comm.leave();
            all
        });
        std::thread::sleep(Duration::from_millis(200));
        let mut stranger = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        // One after the other, they would take longer than a rank waits for a sign of rank 0.
        let silent = [(); 3].map(|()| std::net::TcpStream::connect(("127.0.0.1", port)).unwrap());
        let second = scope.spawn(move || {
            let mut comm = Tcp::connect(&ranks(1, 2, port), &options()).unwrap();
            comm.gather("hello", vec![2]).unwrap();
            comm.leave();
        });
        second.join().unwrap();
        assert_eq!(first.join().unwrap(), [vec![1], vec![2]]);
        drop(silent);
    });
}

#[test]
fn a_rank_whose_introduction_cannot_be_read_ends_the_start() {
    use std::io::Write as _;
    let port = free_port();
    let mut hello = Vec::new();
    Frame::write(&mut hello, Kind::Hello, 0, "", b"{}").unwrap();
    hello[7] ^= 1;
    std::thread::scope(|scope| {
        let first = scope.spawn(move || Tcp::connect(&ranks(0, 3, port), &options()).map(|_| ()).unwrap_err());
        let second = scope.spawn(move || Tcp::connect(&ranks(1, 3, port), &options()).map(|_| ()).unwrap_err());
        std::thread::sleep(Duration::from_millis(300));
        let mut third = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        third.write_all(&hello).unwrap();
        for error in [first.join().unwrap(), second.join().unwrap()] {
            let error = error.to_string();
            assert!(error.contains("is a rank of another version of qlora, or its message was damaged"), "{error}");
        }
    });
}

#[test]
fn who_is_missing_is_named() {
    let port = free_port();
    let impatient = TcpOptions { patience: Duration::from_millis(300), ..options() };
    let error = Tcp::connect(&ranks(0, 4, port), &impatient).unwrap_err().to_string();
    assert_eq!(error, "rank 0 waited for ranks 1, 2, 3 of 4 in vain");
    let error = Tcp::connect(&ranks(1, 4, port), &impatient).unwrap_err().to_string();
    assert!(error.starts_with("rank 0 cannot be reached at 127.0.0.1:"), "{error}");
}

#[test]
fn broken_packets_are_errors() {
    let whole = pack(&[vec![1, 2], vec![], vec![3]]);
    assert_eq!(unpack(&whole, 3).unwrap(), [vec![1, 2], vec![], vec![3]]);
    for end in 0..whole.len() {
        assert!(unpack(&whole[..end], 3).is_err());
    }
    assert!(unpack(&u64::MAX.to_le_bytes(), 1).is_err());
}
