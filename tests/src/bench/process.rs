//! What a process uses, by the kernel's account.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};
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
    let stat =
        fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("no process {pid}"))?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    // Hertz of the kernel's account, 100 nearly everywhere.
    let hertz = sysconf(SysconfVar::CLK_TCK)?.and_then(|hertz| u64::try_from(hertz).ok()).unwrap_or(100);
    let ticks = ticks(&stat).with_context(|| format!("can't read the account of process {pid}"))?;
    Ok(Usage {
        cpu: Duration::from_millis(ticks * 1000 / hertz.max(1)),
        resident: kilobytes(&status, "VmRSS:") * 1024,
        peak: kilobytes(&status, "VmHWM:") * 1024,
    })
}

/// Fields 14 and 15; the name before them may hold anything, even parentheses.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

fn kilobytes(status: &str, field: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.trim().split(' ').next()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_account_is_read_behind_a_name_with_parentheses() {
        let stat = "12 (a) b) S 1 12 12 0 -1 4194304 100 0 0 0 70 30 0 0 20 0 1 0 5 1000 200";
        assert_eq!(ticks(stat), Some(100));
        assert_eq!(kilobytes("Name:\tx\nVmHWM:\t   2048 kB\n", "VmHWM:"), 2048);
    }
}
