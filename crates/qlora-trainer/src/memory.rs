//! The memory use of the process: of the host from `/proc/self/status` (Linux; `None` elsewhere), of a GPU from its
//! pool.

use qlora_kernels::Workspace;

/// The largest resident set the process ever had (`VmHWM`), in bytes. Pages of memory-mapped files count while resident.
pub fn peak_resident() -> Option<u64> {
    status_field("VmHWM")
}

/// The anonymous memory that is resident now (`RssAnon`), in bytes: what the process itself holds, memory-mapped files
/// left out.
pub fn anonymous_resident() -> Option<u64> {
    status_field("RssAnon")
}

/// The most memory of the workspace's GPU in use at one time since the process began, in bytes; `None` on the CPU.
pub fn gpu_peak(workspace: &Workspace) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = workspace.gpu() {
        return gpu.pool().peak().ok();
    }
    let _ = workspace;
    None
}

fn status_field(name: &str) -> Option<u64> {
    parse_field(&std::fs::read_to_string("/proc/self/status").ok()?, name)
}

/// The value of a line such as `VmHWM:     1234 kB`, in bytes.
fn parse_field(status: &str, name: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_bytes() {
        let status = "Name:\tx\nVmHWM:\t   12 kB\nRssAnon:\t 7 kB\nThreads:\t2\n";
        assert_eq!(parse_field(status, "VmHWM"), Some(12 * 1024));
        assert_eq!(parse_field(status, "RssAnon"), Some(7 * 1024));
        assert_eq!(parse_field(status, "VmRSS"), None);
        assert_eq!(parse_field(status, "Threads"), None);
    }

    #[test]
    fn the_cpu_has_no_gpu_memory() {
        assert_eq!(gpu_peak(&Workspace::cpu()), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_peak_grows_with_what_is_touched() {
        let before = peak_resident().unwrap();
        let block = vec![1u8; 64 << 20];
        assert!(anonymous_resident().unwrap() >= 64 << 20);
        assert!(peak_resident().unwrap() >= before.max(64 << 20));
        std::hint::black_box(&block);
    }
}
