//! Looks at the host: what will be changed, as it is. Changes nothing.

use std::collections::HashMap;
use std::path::Path;

use flannel_migration_protocol::Grant;

use crate::host::cni::{self, Attachment};
use crate::host::links::{self, Link};
use crate::host::netlink::Socket;
use crate::host::netns;
use crate::host::saved::Saved;
use crate::host::sysctl::{self, Table};
use crate::inventory::{self, Facts, Inside, Inventory, Known};
use crate::journal::{Bridge, Captured, Device, Journal};
use crate::steps::{Error, Site, device, pods, rules};

/// Name of the bridge when no record tells: the bridge plugin's default.
const BRIDGE: &str = "cni0";

/// Captures everything for the lease in the journal, and decides about each pod.
pub fn capture(
    journal: &Journal,
    grant: &Grant,
    site: &Site,
    known: Option<&[Known]>,
) -> Result<(Captured, Inventory), Error> {
    let mut captured = configs(grant, site)?;
    let mut socket = Socket::open()?;
    let links = links::links(&mut socket)?;
    let vni = grant.flannel.vni;
    captured.device = vxlan(&mut socket, &links, grant, &format!("flannel.{vni}"), device::CALICO)?;
    if grant.flannel.networks.iter().any(|network| network.addr().is_ipv6()) {
        let name = format!("flannel-v6.{vni}");
        captured.device6 = Some(vxlan(&mut socket, &links, grant, &name, device::CALICO_V6)?);
    }
    captured.bridge = bridge(&mut socket, &links, &captured)?;
    rules::capture(&rules::flannel(journal, &captured), &mut captured)?;
    let inventory = inventory(&mut captured, site, &links, known)?;
    Ok((captured, inventory))
}

/// Looks again at bridge and pods, after the config was swapped: only now no more of them can come.
pub fn refresh(captured: &mut Captured, site: &Site, known: Option<&[Known]>) -> Result<Inventory, Error> {
    let mut socket = Socket::open()?;
    let links = links::links(&mut socket)?;
    captured.bridge = bridge(&mut socket, &links, captured)?;
    inventory(captured, site, &links, known)
}

fn inventory(
    captured: &mut Captured,
    site: &Site,
    links: &[Link],
    known: Option<&[Known]>,
) -> Result<Inventory, Error> {
    let attachments = cni::attachments(&site.results)?;
    let networks: Vec<String> = captured.configs.iter().map(|config| config.network.clone()).collect();
    let inside = insides(&attachments, &networks);
    let link_locals = links::link_locals(&mut Socket::open()?)?;
    let mut inventory = inventory::take(&Facts {
        networks: &networks,
        attachments: &attachments,
        links,
        bridge: captured.bridge.as_ref().map(|bridge| &bridge.link),
        canal: captured.canal,
        dual: captured.device6.is_some(),
        link_locals: &link_locals,
        inside: &inside,
        pods: known,
    });
    for pod in &mut inventory.adopt {
        pod.settings = pods::host_end_settings(&pod.veth, pod.v6.is_some())?;
    }
    captured.pods.clone_from(&inventory.adopt);
    Ok(inventory)
}

fn configs(grant: &Grant, site: &Site) -> Result<Captured, Error> {
    let directory = Path::new(&grant.flannel.cni_conf_dir);
    let configs = cni::configs(directory)?;
    let calico_path = directory.join(&grant.calico.cni_conf_name);
    let text = cni::render(grant, &site.node)?;
    let value: serde_json::Value = serde_json::from_str(&text).map_err(cni::Error::Json)?;
    let flannels: Vec<_> = configs.iter().filter(|config| config.is_flannels()).cloned().collect();
    if flannels.is_empty() {
        let found: Vec<String> = configs.iter().map(|config| config.path.display().to_string()).collect();
        let found = if found.is_empty() { "nothing".to_owned() } else { found.join(", ") };
        return Err(Error::Unfit(
            "FlannelConfigMissing",
            format!("no CNI config of flannel's in {}; found {found}", directory.display()),
        ));
    }
    let first = configs
        .iter()
        .find(|config| !config.is_flannels() && flannels.iter().all(|flannel| config.path < flannel.path));
    if let Some(config) = first.filter(|config| config.path != calico_path) {
        return Err(Error::Unfit(
            "AnotherConfigFirst",
            format!(
                "{} comes before flannel's CNI config; the node's pods aren't flannel's",
                config.path.display()
            ),
        ));
    }
    Ok(Captured {
        calico_config: text,
        calico_before: configs.iter().find(|config| config.path == calico_path).cloned(),
        calico_path,
        calico_network: value.get("name").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned(),
        configs: flannels,
        canal: grant.flannel.canal,
        ..Captured::default()
    })
}

fn vxlan(
    socket: &mut Socket,
    links: &[Link],
    grant: &Grant,
    name: &str,
    calicos: &str,
) -> Result<Device, Error> {
    let Some(link) = links.iter().find(|link| link.name == name) else {
        return Err(Error::Unfit("VxlanDeviceMissing", format!("there is no device {name}")));
    };
    if links.iter().any(|link| link.name == calicos) {
        let why = format!("a device {calicos} is there beside {name}");
        return Err(Error::Unfit("CalicoDevicePresent", why));
    }
    let Some(vxlan) = &link.vxlan else {
        return Err(Error::Unfit("NotVxlan", format!("{name} is no VXLAN device but {}", link.kind)));
    };
    if (vxlan.vni, vxlan.port) != (grant.flannel.vni, grant.flannel.port) {
        return Err(Error::Unfit(
            "VxlanDiffers",
            format!(
                "{name} has VNI {} and port {}; flannel's configuration says VNI {} and port {}",
                vxlan.vni, vxlan.port, grant.flannel.vni, grant.flannel.port
            ),
        ));
    }
    if !link.up {
        return Err(Error::Unfit("VxlanDeviceDown", format!("{name} is down")));
    }
    let index = link.index;
    Ok(Device {
        link: link.clone(),
        addresses: links::addresses(socket, index)?.iter().map(Saved::address).collect(),
        routes: links::routes(socket, Some(index))?.iter().map(Saved::route).collect(),
        neighbours: links::permanent_neighbours(socket, index)?.iter().map(Saved::neighbour).collect(),
        forwarding: links::forwarding(socket, index)?.iter().map(Saved::neighbour).collect(),
    })
}

fn bridge(socket: &mut Socket, links: &[Link], captured: &Captured) -> Result<Option<Bridge>, Error> {
    if captured.canal {
        return Ok(None);
    }
    let Some(link) = links.iter().find(|link| link.name == BRIDGE) else {
        return Ok(None);
    };
    if link.kind != "bridge" {
        return Err(Error::Unfit("NotABridge", format!("{BRIDGE} is no bridge but {}", link.kind)));
    }
    Ok(Some(Bridge {
        link: link.clone(),
        addresses: links::addresses(socket, link.index)?.iter().map(Saved::address).collect(),
        settings: pods::bridge_settings(BRIDGE, captured.device6.is_some())?,
    }))
}

// What can't be looked into is left out: the namespace is gone, or it goes this very moment.
fn insides(attachments: &[Attachment], networks: &[String]) -> HashMap<String, Inside> {
    let mut found = HashMap::new();
    for attachment in attachments.iter().filter(|attachment| networks.contains(&attachment.network)) {
        let path = netns::host_path(&attachment.netns);
        let interface = &attachment.interface;
        let looked = netns::run(&path, || {
            let mut inside = look(&mut Socket::open()?, interface)?;
            if let Some(inside) = &mut inside {
                inside.accept_redirects = sysctl::read(Table::Conf6, interface, pods::REDIRECTS).ok();
            }
            Ok(inside)
        });
        let looked = looked.map_err(Error::from).and_then(|looked| looked);
        match looked {
            Ok(Some(inside)) => {
                found.insert(attachment.sandbox.clone(), inside);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(
                    sandbox = attachment.sandbox,
                    error = crate::steps::chain(&error),
                    "not looked into"
                );
            }
        }
    }
    found
}

fn look(socket: &mut Socket, interface: &str) -> Result<Option<Inside>, Error> {
    let links = links::links(socket)?;
    let Some(link) = links.iter().find(|link| link.name == interface).cloned() else {
        return Ok(None);
    };
    let more_links = links.iter().any(|other| other.up && other.name != "lo" && other.index != link.index);
    let addresses = links::addresses(socket, link.index)?.iter().filter_map(links::address_of).collect();
    let routes = links::routes(socket, Some(link.index))?;
    Ok(Some(Inside { link, addresses, routes, more_links, accept_redirects: None }))
}
