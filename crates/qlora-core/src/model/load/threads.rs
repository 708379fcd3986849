//! Tensors loaded by several threads: while one waits for the disk or the GPU, others read, copy and quantize.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError, mpsc};
use std::thread;

use super::tensor::{Context, Job, Place, Tools};
use crate::error::Result;
use crate::model::ModelPart;

/// The most threads for a GPU: more do not make a disk or the page cache faster.
const MOST_THREADS: usize = 8;

/// Bytes of host memory for tensors that are read whole; one may be larger.
const MOST_IN_MEMORY: u64 = 1 << 30;

/// The loaded tensors.
pub(super) type Parts = HashMap<(String, Place), ModelPart>;

/// Loads all tensors; `progress` gets bytes of the files. On the CPU one after the other, so that memory holds no more than
/// one tensor in its stored precision besides the model: quantizing uses all cores there.
///
/// # Errors
/// The first failure, in the order of `jobs` as far as they were started.
pub(super) fn load(context: &Context, jobs: Vec<Job>, mut progress: impl FnMut(u64, u64)) -> Result<Parts> {
    let bytes: Vec<u64> = jobs.iter().map(|job| context.source.stored_bytes(&job.name)).collect();
    let (mut done, total) = (0, bytes.iter().sum());
    let mut parts = Parts::with_capacity(jobs.len());
    let mut arrived = |index: usize, loaded: Option<ModelPart>| {
        let Job { name, place, .. } = &jobs[index];
        parts.extend(loaded.map(|loaded| ((name.clone(), *place), loaded)));
        done += bytes[index];
        progress(done, total);
    };
    let threads = match context.workspace.device().is_cpu() {
        true => 1,
        false => thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS).min(jobs.len()),
    };
    // All tools first: what they allocate on a GPU then leaves one hole when they are gone, and not many.
    let mut tools = vec![Tools::new(context, &jobs)?];
    // Where there is no room for more, fewer threads do.
    tools.extend((1..threads).map_while(|_| Tools::new(context, &jobs).ok()));
    if let [tools] = &mut *tools {
        for (index, job) in jobs.iter().enumerate() {
            arrived(index, context.load(job, tools)?);
        }
        return Ok(parts);
    }
    let (next, stop, gate) = (AtomicUsize::new(0), AtomicBool::new(false), Gate::default());
    let mut failed: Option<(usize, crate::Error)> = None;
    thread::scope(|scope| {
        let (send, receive) = mpsc::channel();
        for mut tools in tools {
            let (send, next, stop, gate, jobs) = (send.clone(), &next, &stop, &gate, &jobs);
            scope.spawn(move || {
                let _stopper = StopOnPanic(stop);
                while !stop.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(index) else { break };
                    let _pass = gate.enter(context.host_bytes(job));
                    let loaded = context.load(job, &mut tools);
                    if loaded.is_err() {
                        stop.store(true, Ordering::Relaxed);
                    }
                    if send.send((index, loaded)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(send);
        for (index, loaded) in receive {
            match loaded {
                Ok(loaded) => arrived(index, loaded),
                Err(error) if failed.as_ref().is_none_or(|(first, _)| index < *first) => failed = Some((index, error)),
                Err(_) => {}
            }
        }
    });
    match failed {
        None => Ok(parts),
        Some((_, error)) => Err(error),
    }
}

/// The other threads need not load the rest of a model when one has panicked.
struct StopOnPanic<'a>(&'a AtomicBool);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// Lets tensors into host memory as long as there is room.
#[derive(Default)]
struct Gate {
    inside: Mutex<u64>,
    left: Condvar,
}

struct GatePass<'a> {
    gate: &'a Gate,
    bytes: u64,
}

impl Gate {
    fn enter(&self, bytes: u64) -> GatePass<'_> {
        let inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |inside: &mut u64| bytes > 0 && *inside > 0 && *inside + bytes > MOST_IN_MEMORY;
        let mut inside = self.left.wait_while(inside, full).unwrap_or_else(PoisonError::into_inner);
        *inside += bytes;
        GatePass { gate: self, bytes }
    }
}

impl Drop for GatePass<'_> {
    fn drop(&mut self) {
        *self.gate.inside.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.gate.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_lets_in_what_fits_and_anything_when_empty() {
        let gate = Gate::default();
        drop(gate.enter(10 * MOST_IN_MEMORY));
        let most = AtomicUsize::new(0);
        let size = MOST_IN_MEMORY / 3;
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let _pass = gate.enter(size);
                    let inside = *gate.inside.lock().unwrap();
                    most.fetch_max(inside as usize, Ordering::Relaxed);
                    thread::sleep(std::time::Duration::from_millis(5));
                });
            }
        });
        let most = most.into_inner() as u64;
        assert!((2 * size..=MOST_IN_MEMORY).contains(&most), "{most} bytes inside at one time");
        assert_eq!(*gate.inside.lock().unwrap(), 0);
    }
}
