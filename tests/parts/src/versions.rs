//! Which versions a cluster is made of.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::{
    sources::{self, Origin, Source},
    stacks::{CALICO, CNI_PLUGINS, CONTAINERD, FLANNEL, FLANNEL_CNI, KUBERNETES, Stack},
};

/// The versions asked for on the command line; the default's where nothing is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct VersionArgs {
    /// Kubernetes' version; `hack/testbed versions` lists what there is.
    #[arg(long, value_name = "VERSION")]
    pub kubernetes: Option<String>,
    /// Calico's version.
    #[arg(long, value_name = "VERSION")]
    pub calico: Option<String>,
    /// flannel's version.
    #[arg(long, value_name = "VERSION")]
    pub flannel: Option<String>,
    /// containerd's version.
    #[arg(long, value_name = "VERSION")]
    pub containerd: Option<String>,
    /// A folder with archives or trees of sources, or one of them; repeatable, beside those that `PARTS_SOURCES` names.
    #[arg(long, value_name = "PATH")]
    pub source: Vec<PathBuf>,
}

/// The versions of a cluster's parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// Of Kubernetes, and of the etcd that it names.
    pub kubernetes: String,
    /// Of containerd.
    pub containerd: String,
    /// Of Calico, its manifests included.
    pub calico: String,
    /// Of flannel, its manifest included.
    pub flannel: String,
    /// Of flannel's CNI plugin.
    pub flannel_cni: String,
    /// Places of sources, those that the environment named included: a later command may have another environment.
    pub sources: Vec<PathBuf>,
}

impl Default for Versions {
    /// What is pinned as the default; flannel's plugin of today where its source is given.
    fn default() -> Self {
        Self::of(&VersionArgs::default())
    }
}

impl Versions {
    /// What the command line asks for. Nothing is looked up yet but flannel's plugin, which no option names.
    #[must_use]
    pub fn of(args: &VersionArgs) -> Self {
        let or = |wanted: &Option<String>, stack: &Stack| {
            wanted.clone().unwrap_or_else(|| stack.default.to_owned())
        };
        Self {
            kubernetes: or(&args.kubernetes, &KUBERNETES),
            containerd: or(&args.containerd, &CONTAINERD),
            calico: or(&args.calico, &CALICO),
            flannel: or(&args.flannel, &FLANNEL),
            flannel_cni: newest_plugin(&args.source),
            sources: sources::named()
                .into_iter()
                .chain(args.source.iter().map(|path| absolute(path)))
                .collect(),
        }
    }

    /// Where each stack of these versions comes from, or one line about the first that can't be had.
    pub fn resolve(&self) -> Result<Vec<(&'static Stack, Source)>> {
        [
            (&KUBERNETES, &self.kubernetes),
            (&CALICO, &self.calico),
            (&CONTAINERD, &self.containerd),
            (&FLANNEL, &self.flannel),
            (&FLANNEL_CNI, &self.flannel_cni),
            (&CNI_PLUGINS, &CNI_PLUGINS.default.to_owned()),
        ]
        .into_iter()
        .map(|(stack, version)| Ok((stack, sources::find(stack, version, &self.sources)?)))
        .collect()
    }

    /// The minor version of Kubernetes, such as 37.
    #[must_use]
    pub fn kubernetes_minor(&self) -> u32 {
        self.kubernetes.split('.').nth(1).and_then(|minor| minor.parse().ok()).unwrap_or(u32::MAX)
    }

    /// Whether flannel's CNI plugin is of flannel's own module, which speaks today's versions of CNI.
    #[must_use]
    pub fn plugin_of_today(&self) -> bool {
        self.flannel_cni != FLANNEL_CNI.default
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// An unreadable source is reported where versions are resolved.
fn newest_plugin(sources: &[PathBuf]) -> String {
    let given = sources::versions(&FLANNEL_CNI, sources).unwrap_or_default();
    given
        .into_iter()
        .rev()
        .find(|source| !matches!(source.origin, Origin::Pinned(_)))
        .map_or_else(|| FLANNEL_CNI.default.to_owned(), |source| source.version)
}
