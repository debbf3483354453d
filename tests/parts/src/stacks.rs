//! The stacks: which programs and manifests come from which Go module.

use std::fmt::Write as _;

/// A program of a stack.
#[derive(Debug)]
pub struct Program {
    /// The file's name in the cache.
    pub name: &'static str,
    /// The Go package that is built. Versions that don't have the package don't have the program.
    pub package: &'static str,
}

/// What is built from one module, in one version.
#[derive(Debug)]
pub struct Stack {
    /// Its directory below `go/`, and the option that chooses its version.
    pub name: &'static str,
    /// How it is called in messages.
    pub title: &'static str,
    /// The module whose version is the stack's.
    pub module: &'static str,
    /// What archives of its source are called in front of `-<version>.tar.xz`.
    pub archive: &'static str,
    /// The version when none is asked for, which is pinned.
    pub default: &'static str,
    /// flannel's udp backend needs cgo; everything else is static without.
    pub cgo: bool,
    /// What is built.
    pub programs: &'static [Program],
    /// Files of the module that are kept, by their last path component.
    pub manifests: &'static [&'static str],
}

const fn program(name: &'static str, package: &'static str) -> Program {
    Program { name, package }
}

/// All stacks, in the order in which they are built: what takes longest first.
pub static STACKS: &[&Stack] = &[&KUBERNETES, &CALICO, &CONTAINERD, &FLANNEL, &CNI_PLUGINS, &FLANNEL_CNI];

/// etcd and Kubernetes; etcd in the version that this Kubernetes names.
pub static KUBERNETES: Stack = Stack {
    name: "kubernetes",
    title: "Kubernetes",
    module: "k8s.io/kubernetes",
    archive: "kubernetes",
    default: "v1.37.2",
    cgo: false,
    programs: &[
        program("etcd", "go.etcd.io/etcd/server/v3"),
        program("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
        program("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
        program("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
        program("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        program("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
        program("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    ],
    manifests: &[],
};

/// Calico, with its stock manifests.
pub static CALICO: Stack = Stack {
    name: "calico",
    title: "Calico",
    module: "github.com/projectcalico/calico",
    archive: "calico",
    default: "v3.28.5",
    cgo: false,
    programs: &[
        program("calico-node", "github.com/projectcalico/calico/node/cmd/calico-node"),
        program("calico-cni", "github.com/projectcalico/calico/cni-plugin/cmd/calico"),
        program("install", "github.com/projectcalico/calico/cni-plugin/cmd/install"),
        program("kube-controllers", "github.com/projectcalico/calico/kube-controllers/cmd/kube-controllers"),
        program("check-status", "github.com/projectcalico/calico/kube-controllers/cmd/check-status"),
        program("calicoctl", "github.com/projectcalico/calico/calicoctl/calicoctl"),
        // The one program of the single image, from v3.33 on.
        program("calico", "github.com/projectcalico/calico/cmd/calico"),
    ],
    manifests: &[
        "manifests/flannel-migration/calico.yaml",
        "manifests/flannel-migration/migration-job.yaml",
        "manifests/canal.yaml",
        "manifests/calico-vxlan.yaml",
    ],
};

/// containerd with its shim and `ctr`.
pub static CONTAINERD: Stack = Stack {
    name: "containerd",
    title: "containerd",
    module: "github.com/containerd/containerd/v2",
    archive: "containerd",
    default: "v2.4.2",
    cgo: false,
    programs: &[
        program("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
        program("containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"),
        program("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
    ],
    manifests: &[],
};

/// flannel, with its stock manifest.
pub static FLANNEL: Stack = Stack {
    name: "flannel",
    title: "flannel",
    module: "github.com/flannel-io/flannel",
    archive: "flannel",
    default: "v0.28.10",
    cgo: true,
    programs: &[
        program("flanneld", "github.com/flannel-io/flannel"),
        // Since v0.28.10: what its init container calls.
        program("install-conf", "github.com/flannel-io/flannel/cmd/install_conf"),
    ],
    manifests: &["Documentation/kube-flannel.yml"],
};

/// The plugins that distributions' packages bring.
pub static CNI_PLUGINS: Stack = Stack {
    name: "cni-plugins",
    title: "the CNI plugins",
    module: "github.com/containernetworking/plugins",
    archive: "cni-plugins",
    default: "v1.10.0",
    cgo: false,
    programs: &[
        program("bandwidth", "github.com/containernetworking/plugins/plugins/meta/bandwidth"),
        program("bridge", "github.com/containernetworking/plugins/plugins/main/bridge"),
        program("host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"),
        program("loopback", "github.com/containernetworking/plugins/plugins/main/loopback"),
        program("portmap", "github.com/containernetworking/plugins/plugins/meta/portmap"),
        program("tuning", "github.com/containernetworking/plugins/plugins/meta/tuning"),
    ],
    manifests: &[],
};

/// flannel's own plugin: the last one of the CNI plugins' module (of 2021, up to CNI 0.4.0), or today's where its source is
/// given, whose package is the module itself.
pub static FLANNEL_CNI: Stack = Stack {
    name: "flannel-cni",
    title: "flannel's CNI plugin",
    module: "github.com/flannel-io/cni-plugin",
    archive: "flannel-cni-plugin",
    default: "v0.9.1",
    cgo: false,
    programs: &[
        program("flannel", "github.com/containernetworking/plugins/plugins/meta/flannel"),
        program("flannel", "github.com/flannel-io/cni-plugin"),
    ],
    manifests: &[],
};

impl Stack {
    /// What the linker is told, for what a program says of itself.
    #[must_use]
    pub fn linker_flags(&self, version: &str) -> String {
        let mut flags = "-s -w".to_owned();
        let mut set = |variable: &str, value: &str| {
            // Writing to a text can't fail.
            let _ = write!(flags, " -X {variable}={value}");
        };
        match self.name {
            "kubernetes" => {
                let mut numbers = version.trim_start_matches('v').split('.');
                let base = "k8s.io/component-base/version";
                set(&format!("{base}.gitVersion"), version);
                set(&format!("{base}.gitMajor"), numbers.next().unwrap_or_default());
                set(&format!("{base}.gitMinor"), numbers.next().unwrap_or_default());
            }
            "containerd" => set("github.com/containerd/containerd/v2/version.Version", version),
            "calico" => set("github.com/projectcalico/calico/pkg/buildinfo.Version", version),
            "flannel" => set("github.com/flannel-io/flannel/pkg/version.Version", version),
            _ => {}
        }
        if self.cgo {
            flags.push_str(" -extldflags \"-static\"");
        }
        flags
    }
}
