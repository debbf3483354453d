//! hostPorts of adopted pods. portmap names a pod's chain after network and sandbox; Calico's portmap will look for the chain by
//! its own network's name, and would leave the old one behind, leading the port to an address that is someone else's.
//! Renaming a chain keeps its rules and every jump to it.

use sha2::{Digest, Sha512};

use crate::host::command;
use crate::host::iptables::{self, WORLDS};
use crate::inventory::Pod;
use crate::journal::Captured;
use crate::steps::Error;

/// Which name the chains get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// That of Calico's network.
    ToCalico,
    /// That of flannel's network.
    ToFlannel,
}

/// Name of a pod's chain: portmap's `MustFormatChainNameWithPrefix(network, sandbox, "DN-")`.
#[must_use]
pub fn chain(network: &str, sandbox: &str) -> String {
    let digest = hex::encode(Sha512::digest(format!("{network}{sandbox}")));
    format!("CNI-DN-{}", digest.get(..21).unwrap_or_default())
}

/// Renames the chains of all adopted pods with hostPorts, in every world of iptables where they are.
pub fn rename(captured: &Captured, direction: Direction) -> Result<(), Error> {
    let pods: Vec<&Pod> = captured.pods.iter().filter(|pod| pod.host_ports).collect();
    let flannels: Vec<&str> = captured.configs.iter().map(|config| config.network.as_str()).collect();
    if pods.is_empty() {
        return Ok(());
    }
    for world in WORLDS {
        let Some(save) = iptables::save(world)? else { continue };
        let present = |chain: &str| save.lines().any(|line| line.starts_with(&format!(":{chain} ")));
        for pod in &pods {
            for flannel in &flannels {
                let old = chain(flannel, &pod.adopted.sandbox);
                let new = chain(&captured.calico_network, &pod.adopted.sandbox);
                let (from, to) = match direction {
                    Direction::ToCalico => (old, new),
                    Direction::ToFlannel => (new, old),
                };
                if present(&from) {
                    command::run(
                        world,
                        &["--wait", "10", "--table", "nat", "--rename-chain", &from, &to],
                        "",
                    )?;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_named_as_portmap_names_it() {
        // Network, sandbox and name are those of portmap's own test.
        let sandbox = "icee6giejonei6sohng6ahngee7laquohquee9shiGo7fohferakah3Feiyoolu2pei7ciPhoh7shaoX6vai3vuf0ahfaeng8yohb9ceu0daez5hashee8ooYai5wa3y";
        let name = chain("testNetName", sandbox);
        assert_eq!(name, "CNI-DN-bfd599665540dd91d5d28");
        assert_eq!(name.len(), 28);
    }
}
