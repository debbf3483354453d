//! The image of Calico's own migration controller, to be measured against: the same program as its official image, around it a base and
//! a kubectl of today.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{
    archive::{self, Content, Files, Image, Layer},
    stock,
};
use crate::{cache, parts::Parts};

/// The controller drains by `kubectl drain --delete-local-data`, an option that kubectl has renamed since.
const KUBECTL: &str = "#!/bin/sh
for word do
    shift
    [ \"$word\" = --delete-local-data ] && word=--delete-emptydir-data
    set -- \"$@\" \"$word\"
done
exec /opt/kubectl \"$@\"
";

/// The archive of the image; built where it isn't in the cache yet.
pub fn peer(parts: &Parts, base: &Path) -> Result<PathBuf> {
    let made_of = parts.key(&["calico", "kubernetes"]);
    let key = cache::key([made_of.as_bytes(), base.display().to_string().as_bytes(), KUBECTL.as_bytes()]);
    let directory = cache::entry("peer", &key, |directory| {
        let files = Files::from([
            ("/usr/bin/kube-controllers", Content::Program(parts.program("calico", "kube-controllers")?)),
            ("/usr/bin/check-status", Content::Program(parts.program("calico", "check-status")?)),
            ("/usr/bin/kubectl", Content::Script(KUBECTL)),
            ("/opt/kubectl", Content::Program(parts.program("kubernetes", "kubectl")?)),
            // The controller keeps its status in this directory, which must be there.
            ("/status/.keep", Content::Script("")),
        ]);
        let own = archive::layer(&directory.join("layer.tar"), &files)?;
        let layers = vec![Layer::of(base)?, own];
        let names = stock::named(&parts.manifest("calico", "migration-job.yaml")?);
        let image = Image { names, layers, entrypoint: vec!["/usr/bin/kube-controllers"], user: None };
        archive::write(&directory.join("peer.tar"), &[image])
    })?;
    Ok(directory.join("peer.tar"))
}
