//! Programs of the host's packet filter, which have no other interface than their command line.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

// iptables may wait for another's lock; on a busy node its list may hold 100 000 rules.
const LIMIT: Duration = Duration::from_secs(20);

/// A program that didn't do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It isn't there.
    #[error("{0} isn't installed")]
    Missing(String),
    /// It couldn't be run.
    #[error("can't run {0}")]
    Run(String, #[source] std::io::Error),
    /// It was still running after the limit, and was killed.
    #[error("{0} didn't end within {1:?}")]
    Late(String, Duration),
    /// It ended with an error.
    #[error("{0} failed: {1}")]
    Failed(String, String),
}

/// Runs a program with a text as its input, and returns what it wrote.
pub fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, Error> {
    let what = || format!("{program} {}", arguments.join(" "));
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::Missing(program.to_owned()),
            _ => Error::Run(what(), error),
        })?;
    let pid = child.id();
    let (sender, receiver) = mpsc::channel();
    let input = input.to_owned();
    let thread = std::thread::spawn(move || {
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
        // A program that ends without reading its input says why by its exit status.
        let output = child.wait_with_output().and_then(|output| match written {
            Err(error) if output.status.success() => Err(error),
            _ => Ok(output),
        });
        drop(sender.send(output));
    });
    let Ok(output) = receiver.recv_timeout(LIMIT) else {
        if let Ok(pid) = i32::try_from(pid) {
            // It may have ended this moment.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        drop(thread.join());
        return Err(Error::Late(what(), LIMIT));
    };
    drop(thread.join());
    let output = output.map_err(|error| Error::Run(what(), error))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(Error::Failed(what(), String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}
