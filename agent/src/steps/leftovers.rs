//! flannel's files, moved aside and kept beside the journal until the migration ends. Binaries of plugins stay: Calico's installer
//! ships the same, and a runtime may need them to tear down what they made.

use std::path::{Path, PathBuf};

use crate::host::files;
use crate::journal::{Captured, Journal};
use crate::steps::{Error, Site};

/// Places of flannel's state: name beside the journal, and path on the host.
fn places(captured: &Captured, site: &Site) -> Vec<(String, PathBuf)> {
    let mut places = vec![
        ("run-flannel".to_owned(), site.flannel_run.clone()),
        ("cni-flannel".to_owned(), site.cni_state.join("flannel")),
    ];
    for network in networks(captured) {
        places.push((format!("networks-{network}"), site.cni_state.join("networks").join(&network)));
    }
    places
}

fn networks(captured: &Captured) -> Vec<String> {
    captured.configs.iter().map(|config| config.network.clone()).filter(|name| !name.is_empty()).collect()
}

fn records(captured: &Captured, directory: &Path) -> Result<Vec<String>, Error> {
    if captured.canal {
        // Calico's network has the same name: they are as Calico's own plugin would have them.
        return Ok(Vec::new());
    }
    let networks = networks(captured);
    let names = files::names(directory)?;
    Ok(names
        .into_iter()
        .filter(|name| networks.iter().any(|network| name.starts_with(&format!("{network}-"))))
        .collect())
}

/// Moves host-local's reservations of Canal's pods aside. Calico's `upgrade-ipam`, which runs before calico-node, would take them
/// for its own of old, and stop the whole cluster's IPAM to import them; the coordinator registers them instead.
pub fn take_reservations(journal: &Journal, captured: &Captured, site: &Site) -> Result<(), Error> {
    for (name, path) in reservations(journal, captured, site) {
        files::make_directory(&journal.directory().join("aside"))?;
        files::move_tree(&path, &name)?;
    }
    Ok(())
}

/// Moves them back.
pub fn put_reservations_back(journal: &Journal, captured: &Captured, site: &Site) -> Result<(), Error> {
    reservations(journal, captured, site)
        .into_iter()
        .try_for_each(|(name, path)| Ok(files::move_tree(&name, &path)?))
}

fn reservations(journal: &Journal, captured: &Captured, site: &Site) -> Vec<(PathBuf, PathBuf)> {
    let networks = if captured.canal { networks(captured) } else { Vec::new() };
    let aside = journal.directory().join("aside");
    networks
        .into_iter()
        .map(|network| {
            (aside.join(format!("networks-{network}")), site.cni_state.join("networks").join(&network))
        })
        .collect()
}

/// Moves them aside.
pub fn take_away(journal: &Journal, captured: &Captured, site: &Site) -> Result<(), Error> {
    let aside = journal.directory().join("aside");
    files::make_directory(&aside.join("results"))?;
    for (name, path) in places(captured, site) {
        files::move_tree(&path, &aside.join(name))?;
    }
    for name in records(captured, &site.results)? {
        files::move_tree(&site.results.join(&name), &aside.join("results").join(&name))?;
    }
    Ok(())
}

/// Moves them back.
pub fn put_back(journal: &Journal, captured: &Captured, site: &Site) -> Result<(), Error> {
    let aside = journal.directory().join("aside");
    for (name, path) in places(captured, site) {
        files::move_tree(&aside.join(name), &path)?;
    }
    for name in records(captured, &aside.join("results"))? {
        files::move_tree(&aside.join("results").join(&name), &site.results.join(&name))?;
    }
    Ok(())
}
