//! Network namespaces: held open by a file, entered by the one thread that opens sockets there.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sched::CloneFlags;

/// A network namespace that stays alive as long as this value does, whatever becomes of its processes.
#[derive(Debug)]
pub struct Netns {
    file: File,
    identity: (u64, u64),
}

impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl Netns {
    /// Opens a namespace by the path of its file (`/run/netns/NAME` or `/proc/PID/ns/net`).
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        Ok(Self { file, identity: (metadata.dev(), metadata.ino()) })
    }

    /// Opens the namespace of a container: containerd's runtime shim leaves the container's first process id
    /// in its task directory on the node, and all nodes share this machine's process ids.
    pub fn open_container(node_root: &Path, container: &str) -> io::Result<Self> {
        let file = container_pid_file(node_root, container);
        let text = std::fs::read_to_string(&file)?;
        let pid: u32 = text.trim().parse().map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{} holds {text:?}", file.display()))
        })?;
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// Whether a path now leads to another namespace than this one.
    #[must_use]
    pub fn differs_from(&self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) != self.identity)
    }

    fn enter(&self) -> io::Result<()> {
        Ok(nix::sched::setns(&self.file, CloneFlags::CLONE_NEWNET)?)
    }
}

fn container_pid_file(node_root: &Path, container: &str) -> PathBuf {
    node_root.join("run/containerd/io.containerd.runtime.v2.task/k8s.io").join(container).join("init.pid")
}

/// The namespace that the calling thread is in, so that opening many sockets in one enters it once.
/// A socket belongs to the namespace it was opened in for all its life.
#[derive(Debug, Default)]
pub struct Here(Option<Arc<Netns>>);

impl Here {
    /// Moves the calling thread into `netns`.
    pub fn enter(&mut self, netns: &Arc<Netns>) -> io::Result<()> {
        if self.0.as_ref().is_none_or(|here| here != netns) {
            netns.enter()?;
            self.0 = Some(Arc::clone(netns));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_namespace_is_that_of_the_process_named_in_its_task_directory() {
        let root = tempfile::tempdir().unwrap();
        let file = container_pid_file(root.path(), "abc");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        assert_eq!(
            Netns::open_container(root.path(), "abc").unwrap_err().kind(),
            io::ErrorKind::NotFound,
            "the task is not there yet"
        );
        std::fs::write(&file, std::process::id().to_string()).unwrap();
        let own = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        assert_eq!(Netns::open_container(root.path(), "abc").unwrap(), own);
        std::fs::write(&file, "").unwrap();
        assert_eq!(Netns::open_container(root.path(), "abc").unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
