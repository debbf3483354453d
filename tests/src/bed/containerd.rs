//! containerd's configuration, and `ctr` for one that isn't in its usual place.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// A containerd by its two directories.
#[derive(Debug, Clone)]
pub struct Containerd {
    /// What it keeps: images, snapshots.
    pub root: PathBuf,
    /// What lasts as long as it runs, its socket included.
    pub state: PathBuf,
}

impl Containerd {
    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.state.join("containerd.sock")
    }

    /// Configuration for storing images only.
    #[must_use]
    pub fn config_without_cri(&self) -> String {
        format!(
            "{}disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n{}",
            self.head(),
            self.socket_section()
        )
    }

    /// Configuration for a node.
    #[must_use]
    pub fn config(&self, sandbox_image: &str) -> String {
        format!(
            r#"{head}{socket}
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{sandbox_image}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"#,
            head = self.head(),
            socket = self.socket_section(),
        )
    }

    /// `ctr args...` for it.
    #[must_use]
    pub fn ctr(&self, args: &[&str]) -> Command {
        ctr(&self.socket(), args)
    }

    fn head(&self) -> String {
        format!("version = 2\nroot = \"{}\"\nstate = \"{}\"\n", self.root.display(), self.state.display())
    }

    fn socket_section(&self) -> String {
        format!("[grpc]\n  address = \"{}\"\n", self.socket().display())
    }
}

/// `ctr args...` in the namespace that the kubelet uses.
#[must_use]
pub fn ctr(socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("ctr");
    command.arg("--address").arg(socket).args(["--namespace", "k8s.io"]).args(args);
    command
}
