//! What a process uses, by the kernel's account.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result};
use nix::{
    time::{ClockId, clock_getcpuclockid},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use crate::bed::{Bed, cgroup::Cgroup};

/// A process at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Processor time so far, user and system.
    pub cpu: Duration,
    /// Memory that is resident, in bytes.
    pub resident: u64,
    /// The most that ever was.
    pub peak: u64,
    /// How often its first thread has waited for something so far.
    #[serde(default)]
    pub waits: u64,
}

/// A command that runs `program` among the test bed's processes on the machine: whatever becomes of us, it goes with the test bed.
pub fn with_bed(bed: &Bed, program: &Path) -> Result<Command> {
    let script = format!("{} && exec \"$@\"", Cgroup::of(&bed.plan.bed, Some("machine")).enter()?);
    let mut command = Command::new("sh");
    command.args(["-c", &script, "sh"]).arg(program);
    Ok(command)
}

/// Looks at a process.
pub fn usage(pid: u32) -> Result<Usage> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let process = Pid::from_raw(i32::try_from(pid)?);
    // To the nanosecond; /proc/PID/stat counts ticks, and may be off by several of them.
    let clock = clock_getcpuclockid(process).and_then(ClockId::now);
    let cpu = Duration::from(clock.with_context(|| format!("can't read the clock of process {pid}"))?);
    Ok(Usage {
        cpu,
        resident: count(&status, "VmRSS:") * 1024,
        peak: count(&status, "VmHWM:") * 1024,
        waits: count(&status, "voluntary_ctxt_switches:"),
    })
}

/// A number of a process's status; memory is in kilobytes.
fn count(status: &str, field: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.trim().split(' ').next()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_process_goes_on_and_its_memory_is_read_from_its_status() {
        let before = usage(std::process::id()).unwrap();
        let sum: u64 = (0..2_000_000_u64).map(std::hint::black_box).sum();
        assert!(usage(std::process::id()).unwrap().cpu > before.cpu, "{sum}");
        assert!(before.resident > 0 && before.peak >= before.resident, "{before:?}");
        assert_eq!(count("Name:\tx\nVmHWM:\t   2048 kB\n", "VmHWM:"), 2048);
    }
}
