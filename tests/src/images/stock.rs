//! The stock images under the names that the versions' own manifests have for them: the real programs, with what their own
//! images have around them.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, bail};

use super::archive::{self, Content, Files, Image, Layer};
use crate::parts::Parts;

/// The sandbox image of the nodes' containerd.
pub const PAUSE: &str = "registry.k8s.io/pause:3.10";

/// The manifests whose images are made, by stack. The images of Calico's own migration controller are the bench's.
const MANIFESTS: &[(&str, &str)] = &[
    ("flannel", "kube-flannel.yml"),
    ("calico", "calico.yaml"),
    ("calico", "canal.yaml"),
    ("calico", "calico-vxlan.yaml"),
];

/// What the calico/node image does through runit: start-up, then the long-running parts beside Felix. The programs are
/// built without cgo and so without libbpf, and Felix must not clean up what only a BPF data plane leaves.
const CALICO_NODE: &str = "#!/bin/sh
calico-node -startup || exit 1
NODENAME=$(cat /var/lib/calico/nodename) || exit 1
export NODENAME FELIX_FELIXHOSTNAME=\"$NODENAME\" FELIX_DATASTORETYPE=\"$DATASTORE_TYPE\"
export FELIX_DebugSkipCTLBCleanup=true
calico-node -allocate-tunnel-addrs -allocate-tunnel-addrs-run-once || exit 1
keep() { while :; do \"$@\"; sleep 1; done; }
keep calico-node -allocate-tunnel-addrs &
[ \"$CALICO_NETWORKING_BACKEND\" = none ] || keep calico-node -monitor-addresses &
[ \"$CALICO_MANAGE_CNI\" = false ] || keep calico-node -monitor-token &
keep calico-node -felix
";

/// The same from v3.33 on, where one program holds all of them.
const CALICO_NODE_COMPONENT: &str = "#!/bin/sh
calico component node startup || exit 1
NODENAME=$(cat /var/lib/calico/nodename) || exit 1
export NODENAME FELIX_FELIXHOSTNAME=\"$NODENAME\" FELIX_DATASTORETYPE=\"$DATASTORE_TYPE\"
export FELIX_DebugSkipCTLBCleanup=true
calico component node allocate-tunnel-addrs --run-once || exit 1
keep() { while :; do \"$@\"; sleep 1; done; }
keep calico component node node-services &
keep calico component felix
";

/// The user of Calico's image of controllers, which its manifest wants not to be root.
const CONTROLLERS_USER: u32 = 999;

/// One image before its layers are written.
#[derive(Debug)]
pub struct Recipe {
    names: Vec<String>,
    on_base: bool,
    files: Files,
    entrypoint: Vec<&'static str>,
    user: Option<u32>,
}

/// Which of the stock images a name means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Flannel,
    FlannelCni,
    CalicoNode,
    CalicoCni,
    CalicoControllers,
    /// From v3.33 on: CNI plugins, controllers and tools in one.
    Calico,
}

impl Kind {
    fn of(name: &str) -> Result<Self> {
        // A colon before the last slash is a registry's port.
        let last = name.rsplit('/').next().unwrap_or_default();
        Ok(match last.split([':', '@']).next().unwrap_or_default() {
            "flannel" => Self::Flannel,
            "flannel-cni-plugin" => Self::FlannelCni,
            "node" => Self::CalicoNode,
            "cni" => Self::CalicoCni,
            "kube-controllers" => Self::CalicoControllers,
            "calico" => Self::Calico,
            other => {
                bail!("the stock manifests name an image {name}: the test bed doesn't know what {other} is")
            }
        })
    }

    fn recipe(self, parts: &Parts, names: Vec<String>) -> Result<Recipe> {
        let (files, entrypoint) = match self {
            Self::Flannel => (flannel(parts)?, vec!["/opt/bin/flanneld"]),
            Self::FlannelCni => (flannel_cni(parts)?, vec![]),
            Self::CalicoNode => (calico_node(parts)?, vec!["/usr/local/bin/start"]),
            Self::CalicoCni => (calico_cni(parts)?, vec!["/opt/cni/bin/install"]),
            Self::CalicoControllers => (controllers(parts)?, vec!["/usr/bin/kube-controllers"]),
            Self::Calico => (calico(parts)?, vec!["/usr/bin/calico"]),
        };
        let user = matches!(self, Self::CalicoControllers | Self::Calico).then_some(CONTROLLERS_USER);
        Ok(Recipe { names, on_base: true, files, entrypoint, user })
    }
}

/// What is to be built, from which files.
pub fn recipes(parts: &Parts) -> Result<Vec<Recipe>> {
    let pause = Recipe {
        names: vec![PAUSE.to_owned()],
        on_base: false,
        files: Files::from([("/busybox", Content::Program("/bin/busybox".into()))]),
        entrypoint: vec!["/busybox", "sleep", "infinity"],
        user: None,
    };
    let mut kinds: BTreeMap<Kind, Vec<String>> = BTreeMap::new();
    for (stack, manifest) in MANIFESTS {
        for name in named(&parts.manifest(stack, manifest)?) {
            let names = kinds.entry(Kind::of(&name)?).or_default();
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    let stock = kinds.into_iter().map(|(kind, names)| kind.recipe(parts, names));
    std::iter::once(Ok(pause)).chain(stock).collect()
}

/// The images that a manifest names, with the registry that a runtime would add.
pub fn named(manifest: &str) -> Vec<String> {
    let image = |line: &str| {
        let line = line.trim_start();
        let value = line.strip_prefix("- ").unwrap_or(line).strip_prefix("image:")?;
        Some(value.trim().trim_matches(['"', '\'']).to_owned())
    };
    let full = |name: String| {
        let registry = name.split('/').next().unwrap_or_default();
        let has_registry = name.contains('/') && (registry.contains(['.', ':']) || registry == "localhost");
        if has_registry { name } else { format!("docker.io/{name}") }
    };
    manifest.lines().filter_map(image).map(full).collect()
}

/// Writes the layers of `recipes` into `directory`.
pub fn images(directory: &Path, base: &Path, recipes: &[Recipe]) -> Result<Vec<Image>> {
    let base = Layer::of(base)?;
    let debian = Image::new(super::DEBIAN, vec![base.clone()]);
    let mut images = vec![debian];
    for (number, recipe) in recipes.iter().enumerate() {
        let own = archive::layer(&directory.join(format!("{number}.tar")), &recipe.files)?;
        images.push(Image {
            names: recipe.names.clone(),
            layers: if recipe.on_base { vec![base.clone(), own] } else { vec![own] },
            entrypoint: recipe.entrypoint.clone(),
            user: recipe.user,
        });
    }
    Ok(images)
}

fn program(parts: &Parts, stack: &str, name: &str) -> Result<Content> {
    parts.program(stack, name).map(Content::Program)
}

/// flannel's own image picks a variant of iptables by a wrapper; here the shape of the cluster does, through PATH.
fn flannel(parts: &Parts) -> Result<Files> {
    let mut files = Files::from([("/opt/bin/flanneld", program(parts, "flannel", "flanneld")?)]);
    // Versions before v0.28.10 copy the configuration by `cp`.
    if let Ok(install) = program(parts, "flannel", "install-conf") {
        files.insert("/opt/bin/install-conf", install);
    }
    for path in [
        "/opt/legacy/iptables",
        "/opt/legacy/iptables-save",
        "/opt/legacy/iptables-restore",
        "/opt/legacy/ip6tables",
        "/opt/legacy/ip6tables-save",
        "/opt/legacy/ip6tables-restore",
    ] {
        files.insert(path, Content::Link("/usr/sbin/xtables-legacy-multi"));
    }
    Ok(files)
}

fn flannel_cni(parts: &Parts) -> Result<Files> {
    Ok(Files::from([("/flannel", program(parts, "flannel-cni", "flannel")?)]))
}

fn calico_node(parts: &Parts) -> Result<Files> {
    if let Ok(node) = program(parts, "calico", "calico-node") {
        return Ok(Files::from([
            ("/usr/bin/calico-node", node),
            ("/usr/local/bin/start", Content::Script(CALICO_NODE)),
        ]));
    }
    let calico = program(parts, "calico", "calico").context("neither calico-node nor calico")?;
    Ok(Files::from([
        ("/usr/bin/calico", calico),
        ("/usr/local/bin/start", Content::Script(CALICO_NODE_COMPONENT)),
    ]))
}

fn calico_cni(parts: &Parts) -> Result<Files> {
    let mut files = plugins(parts)?;
    files.extend([
        ("/opt/cni/bin/install", program(parts, "calico", "install")?),
        ("/opt/cni/bin/calico", program(parts, "calico", "calico-cni")?),
        // The installer copies files, not links, so the second name is a second copy, as in the real image.
        ("/opt/cni/bin/calico-ipam", program(parts, "calico", "calico-cni")?),
    ]);
    Ok(files)
}

/// The plugins that Calico's image brings.
fn plugins(parts: &Parts) -> Result<Files> {
    Ok(Files::from([
        ("/opt/cni/bin/bandwidth", program(parts, "cni-plugins", "bandwidth")?),
        ("/opt/cni/bin/flannel", program(parts, "flannel-cni", "flannel")?),
        ("/opt/cni/bin/host-local", program(parts, "cni-plugins", "host-local")?),
        ("/opt/cni/bin/loopback", program(parts, "cni-plugins", "loopback")?),
        ("/opt/cni/bin/portmap", program(parts, "cni-plugins", "portmap")?),
        ("/opt/cni/bin/tuning", program(parts, "cni-plugins", "tuning")?),
    ]))
}

fn controllers(parts: &Parts) -> Result<Files> {
    Ok(Files::from([
        ("/usr/bin/kube-controllers", program(parts, "calico", "kube-controllers")?),
        ("/usr/bin/check-status", program(parts, "calico", "check-status")?),
        // Where the controllers write what their probes read.
        ("/status", Content::Directory),
    ]))
}

fn calico(parts: &Parts) -> Result<Files> {
    let mut files = plugins(parts)?;
    files.extend([
        ("/usr/bin/calico", program(parts, "calico", "calico")?),
        ("/usr/bin/calico-ipam", Content::Link("calico")),
        ("/status", Content::Directory),
    ]);
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_those_that_the_manifest_names() {
        let manifest = "
          initContainers:
            - name: a
              image: quay.io/calico/cni:v3.32.1
            - image: \"calico/node:v3.28.5\"
              # image: not/this:one
          image: localhost:5000/flannel:v1
        ";
        let names =
            ["quay.io/calico/cni:v3.32.1", "docker.io/calico/node:v3.28.5", "localhost:5000/flannel:v1"];
        assert_eq!(named(manifest), names);
    }

    #[test]
    fn an_image_is_known_by_its_repository() {
        let kinds = [
            ("quay.io/calico/cni:v3.32.1", Kind::CalicoCni),
            ("quay.io/calico/calico:release-v3.33", Kind::Calico),
            ("docker.io/calico/node@sha256:0123", Kind::CalicoNode),
            ("ghcr.io/flannel-io/flannel-cni-plugin:v1.6.2-flannel1", Kind::FlannelCni),
            ("localhost:5000/flannel", Kind::Flannel),
        ];
        for (name, kind) in kinds {
            assert_eq!(Kind::of(name).unwrap(), kind, "{name}");
        }
        assert!(Kind::of("quay.io/calico/typha:v3.32.1").is_err());
    }
}
