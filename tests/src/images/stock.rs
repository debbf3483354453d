//! The stock images under their stock names: the real programs, with what their own images have around them.

use std::path::Path;

use anyhow::Result;

use super::archive::{self, Content, Files, Image, Layer};
use crate::parts::Parts;

/// The sandbox image of the nodes' containerd.
pub const PAUSE: &str = "registry.k8s.io/pause:3.10";

/// What docker.io/calico/node does through runit: start-up, then the long-running parts beside Felix.
const CALICO_NODE: &str = "#!/bin/sh
calico-node -startup || exit 1
NODENAME=$(cat /var/lib/calico/nodename) || exit 1
export NODENAME FELIX_FELIXHOSTNAME=\"$NODENAME\" FELIX_DATASTORETYPE=\"$DATASTORE_TYPE\"
calico-node -allocate-tunnel-addrs -allocate-tunnel-addrs-run-once || exit 1
keep() { while :; do \"$@\"; sleep 1; done; }
keep calico-node -allocate-tunnel-addrs &
[ \"$CALICO_NETWORKING_BACKEND\" = none ] || keep calico-node -monitor-addresses &
[ \"$CALICO_MANAGE_CNI\" = false ] || keep calico-node -monitor-token &
keep calico-node -felix
";

/// One image before its layers are written.
#[derive(Debug)]
pub struct Recipe {
    names: Vec<&'static str>,
    on_base: bool,
    files: Files,
    entrypoint: Vec<&'static str>,
}

/// What is to be built, from which files.
pub fn recipe(parts: &Parts) -> Result<Vec<Recipe>> {
    let program = |stack: &str, name: &str| parts.program(stack, name).map(Content::Program);
    // flannel's own image picks a variant by a wrapper; here the shape of the cluster does, through PATH.
    let legacy =
        ["iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"];
    let mut flannel: Files = Files::from([
        ("/opt/bin/flanneld", program("flannel", "flanneld")?),
        ("/opt/bin/install-conf", program("flannel", "install-conf")?),
    ]);
    for name in legacy {
        let path: &'static str = match name {
            "iptables" => "/opt/legacy/iptables",
            "iptables-save" => "/opt/legacy/iptables-save",
            "iptables-restore" => "/opt/legacy/iptables-restore",
            "ip6tables" => "/opt/legacy/ip6tables",
            "ip6tables-save" => "/opt/legacy/ip6tables-save",
            _ => "/opt/legacy/ip6tables-restore",
        };
        flannel.insert(path, Content::Link("/usr/sbin/xtables-legacy-multi"));
    }
    let cni_plugins = [
        ("/opt/cni/bin/bandwidth", "bandwidth"),
        ("/opt/cni/bin/host-local", "host-local"),
        ("/opt/cni/bin/loopback", "loopback"),
        ("/opt/cni/bin/portmap", "portmap"),
        ("/opt/cni/bin/tuning", "tuning"),
    ];
    let mut calico_cni: Files = Files::from([
        ("/opt/cni/bin/install", program("calico", "install")?),
        ("/opt/cni/bin/calico", program("calico", "calico")?),
        // The installer copies files, not links, so the second name is a second copy, as in the real image.
        ("/opt/cni/bin/calico-ipam", program("calico", "calico")?),
        ("/opt/cni/bin/flannel", program("flannel-cni", "flannel")?),
    ]);
    for (path, name) in cni_plugins {
        calico_cni.insert(path, program("cni", name)?);
    }
    Ok(vec![
        Recipe {
            names: vec![PAUSE],
            on_base: false,
            files: Files::from([("/busybox", Content::Program("/bin/busybox".into()))]),
            entrypoint: vec!["/busybox", "sleep", "infinity"],
        },
        Recipe {
            names: vec!["ghcr.io/flannel-io/flannel:v0.28.10", "docker.io/flannel/flannel:v0.24.3"],
            on_base: true,
            files: flannel,
            entrypoint: vec!["/opt/bin/flanneld"],
        },
        Recipe {
            names: vec!["ghcr.io/flannel-io/flannel-cni-plugin:v1.9.1-flannel3"],
            on_base: true,
            files: Files::from([("/flannel", program("flannel-cni", "flannel")?)]),
            entrypoint: vec![],
        },
        Recipe {
            names: vec!["docker.io/calico/cni:v3.28.5"],
            on_base: true,
            files: calico_cni,
            entrypoint: vec!["/opt/cni/bin/install"],
        },
        Recipe {
            names: vec!["docker.io/calico/node:v3.28.5"],
            on_base: true,
            files: Files::from([
                ("/usr/bin/calico-node", program("calico", "calico-node")?),
                ("/usr/local/bin/start", Content::Script(CALICO_NODE)),
            ]),
            entrypoint: vec!["/usr/local/bin/start"],
        },
        Recipe {
            names: vec!["docker.io/calico/kube-controllers:v3.28.5"],
            on_base: true,
            files: Files::from([
                ("/usr/bin/kube-controllers", program("calico", "kube-controllers")?),
                ("/usr/bin/check-status", program("calico", "check-status")?),
            ]),
            entrypoint: vec!["/usr/bin/kube-controllers"],
        },
    ])
}

/// Writes the layers of `recipes` into `directory`.
pub fn images(directory: &Path, base: &Path, recipes: &[Recipe]) -> Result<Vec<Image>> {
    let base = Layer::of(base)?;
    let debian = Image {
        names: vec!["docker.io/library/debian:trixie-slim"],
        layers: vec![base.clone()],
        entrypoint: vec![],
    };
    let mut images = vec![debian];
    for (number, recipe) in recipes.iter().enumerate() {
        let own = archive::layer(&directory.join(format!("{number}.tar")), &recipe.files)?;
        let layers = if recipe.on_base { vec![base.clone(), own] } else { vec![own] };
        images.push(Image { names: recipe.names.clone(), layers, entrypoint: recipe.entrypoint.clone() });
    }
    Ok(images)
}
