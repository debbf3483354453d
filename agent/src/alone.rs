//! One agent at a time on a node. A kubelet may start a new one while an old one still ends, and two would write one journal.

use std::io::{Error, ErrorKind};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio_util::sync::CancellationToken;

/// Name of the socket. It is in no file system but in the host's network namespace, and goes with its last owner.
pub const NAME: &str = "flannel-migration-agent";
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// As long as this lives, or a program that the agent has started, no other agent of the node does anything.
#[derive(Debug)]
pub struct Alone {
    _socket: UnixListener,
}

/// Waits until no other holds `name`; `None` when `shutdown` comes first.
pub async fn wait(name: &str, shutdown: &CancellationToken) -> Result<Option<Alone>, Error> {
    let address = SocketAddr::from_abstract_name(name)?;
    let mut told = false;
    loop {
        match UnixListener::bind_addr(&address) {
            Ok(socket) => {
                // Programs that outlive a killed agent inherit it: what they still change isn't changed by two.
                fcntl(&socket, FcntlArg::F_SETFD(FdFlag::empty()))?;
                return Ok(Some(Alone { _socket: socket }));
            }
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                if !told {
                    tracing::info!(
                        step = "start",
                        "another agent of this node is still at work; waiting for its end"
                    );
                    told = true;
                }
            }
            Err(error) => return Err(error),
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            () = shutdown.cancelled() => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_second_waits_until_the_first_and_its_programs_are_gone() {
        let (name, shutdown) = (format!("alone-{}", std::process::id()), CancellationToken::new());
        let first = wait(&name, &shutdown).await.unwrap();
        let mut program = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        drop(first);
        let asked = CancellationToken::new();
        let second = tokio::time::timeout(Duration::from_millis(300), wait(&name, &asked)).await;
        assert!(second.is_err(), "a program of the first still runs");
        program.kill().unwrap();
        program.wait().unwrap();
        assert!(wait(&name, &asked).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn waiting_ends_when_it_is_to() {
        let (name, shutdown) = (format!("alone-end-{}", std::process::id()), CancellationToken::new());
        let _first = wait(&name, &shutdown).await.unwrap();
        shutdown.cancel();
        assert!(wait(&name, &shutdown).await.unwrap().is_none());
    }
}
