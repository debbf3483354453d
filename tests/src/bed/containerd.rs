//! containerd's configuration, and `ctr` for one that isn't in its usual place.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::parts::Parts;

/// A containerd: its programs, and its two directories.
#[derive(Debug, Clone)]
pub struct Containerd {
    /// containerd itself.
    pub program: PathBuf,
    /// What runs beside each pod.
    shim: PathBuf,
    ctr: PathBuf,
    /// What it keeps: images, snapshots.
    root: PathBuf,
    /// What lasts as long as it runs, its socket included.
    state: PathBuf,
}

impl Containerd {
    /// The containerd of these parts, with these directories.
    pub fn new(parts: &Parts, root: &Path, state: &Path) -> Result<Self> {
        let program = |name| parts.program("containerd", name);
        Ok(Self {
            program: program("containerd")?,
            shim: program("containerd-shim-runc-v2")?,
            ctr: program("ctr")?,
            root: root.to_owned(),
            state: state.to_owned(),
        })
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.state.join("containerd.sock")
    }

    /// Configuration for storing images only.
    #[must_use]
    pub fn config_without_cri(&self) -> String {
        let plugins = r#"disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]"#;
        format!("{}{plugins}\n{}", self.head(), self.socket_section())
    }

    /// Configuration for a node.
    #[must_use]
    pub fn config(&self, sandbox_image: &str) -> String {
        format!(
            r#"{head}{socket}
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{sandbox_image}"
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    runtime_path = "{shim}"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      SystemdCgroup = false
"#,
            head = self.head(),
            socket = self.socket_section(),
            shim = self.shim.display(),
        )
    }

    /// `ctr args...` for it, in the namespace that the kubelet uses.
    #[must_use]
    pub fn ctr(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.ctr);
        command.arg("--address").arg(self.socket()).args(["--namespace", "k8s.io"]).args(args);
        command
    }

    /// What every containerd of version 2 reads.
    fn head(&self) -> String {
        format!("version = 3\nroot = \"{}\"\nstate = \"{}\"\n", self.root.display(), self.state.display())
    }

    fn socket_section(&self) -> String {
        format!("[grpc]\n  address = \"{}\"\n", self.socket().display())
    }
}
