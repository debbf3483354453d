//! Reads the cluster: what is detected of flannel and Calico, without changing anything.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use flannel_migration_protocol::{Strategy, keys};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt as _};
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use tracing::debug;

use crate::api::{Result, chain, found, read};
use crate::args::Options;
use crate::calico::names;
use crate::calico::types::{FelixConfiguration, IPAMBlock, IPPool};
use crate::cluster::NodeFacts;
use crate::discover::{self, FlannelDaemon, NetConf, VXLAN_VNI};
use crate::finish::Record;
use crate::pages;
use crate::preflight::calico::Datastore;
use crate::preflight::drain::{self, Workloads};
use crate::preflight::nodes::host;
use crate::preflight::server::Server;
use crate::settings::{self, Detected};

/// For how long an API server may ask for patience, and how long each time.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_secs(1);

/// Everything that was read.
#[derive(Clone, Debug)]
pub struct Survey {
    /// What settings are made from.
    pub detected: Detected,
    /// flannel's configuration as text, if it is there but can't be read: why.
    pub net_conf_error: Option<String>,
    /// Whether it is in a Secret that may not be read.
    pub net_conf_forbidden: bool,
    /// A finish that was begun.
    pub finishing: Option<Record>,
    /// Desired and ready pods of Calico's DaemonSet.
    pub calico_pods: (i32, i32),
    /// Whether the agents' DaemonSet is there.
    pub agents: bool,
    /// Whether an addon manager would undo what is changed on flannel's DaemonSet.
    pub addon_managed: bool,
    /// What Calico's datastore holds.
    pub datastore: Datastore,
    /// The API server, our rights there, and others at the same work.
    pub server: Server,
    /// Nodes with Windows in flannel's network.
    pub windows: Vec<String>,
    /// What runs where.
    pub workloads: Workloads,
}

/// Reads everything. An API server that has just learned of Calico's resources asks for patience at first (429).
///
/// `foreign`: nodes in flannel's network that don't run Linux.
pub async fn survey(
    client: &Client,
    options: &Options,
    nodes: &[Arc<NodeFacts>],
    foreign: &[String],
) -> Result<Survey> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match read_all(client, options, nodes, foreign).await {
            Err(error) if error.too_many_requests().is_some() && Instant::now() < deadline => {
                debug!(error = chain(&error), "asked to come back");
                sleep(PAUSE).await;
            }
            other => return other,
        }
    }
}

async fn read_all(
    client: &Client,
    options: &Options,
    nodes: &[Arc<NodeFacts>],
    foreign: &[String],
) -> Result<Survey> {
    let stated = &options.stated;
    let sets: Api<DaemonSet> = Api::all(client.clone());
    let sets = read("list DaemonSets", sets.list(&ListParams::default())).await?.items;
    let flannel = discover::flannel_daemons(&sets);
    let calico = discover::calico_daemons(&sets);
    let set_of = |name: &discover::Name| {
        sets.iter()
            .find(|set| set.name_any() == name.name && set.namespace().as_deref() == Some(&name.namespace))
    };

    let (mut config, mut addon_managed) = (Config::default(), false);
    if let Ok(Some(daemon)) = settings::flannel(stated, &flannel) {
        config = net_conf(client, daemon).await?;
        addon_managed = set_of(&daemon.daemon_set)
            .is_some_and(|set| set.labels().contains_key("addonmanager.kubernetes.io/mode"));
    }

    let (mut template, mut calico_pods, mut finishing) = (None, (0, 0), None);
    if let Ok(Some(daemon)) = settings::calico(stated, &calico) {
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &daemon.daemon_set.namespace);
        let data = data_of(&maps, &daemon.config_map).await?.unwrap_or_default();
        template = data.get(&daemon.template_key).map(|text| daemon.installer.complete(text, &data));
        if let Some(set) = set_of(&daemon.daemon_set) {
            finishing = Record::of(set);
            calico_pods = set
                .status
                .as_ref()
                .map_or((0, 0), |status| (status.desired_number_scheduled, status.number_ready));
        }
    }

    let datastore = datastore(client).await?;
    let vni = config.conf.as_ref().and_then(|conf| conf.backend.vni).unwrap_or(VXLAN_VNI);
    let mtu = felix_mtu(&datastore, nodes)
        .or_else(|| smallest_mtu(nodes, vni))
        .or_else(|| device_mtu(Path::new("/sys/class/net"), vni));
    let workloads = workloads(client, options, nodes).await?;
    Ok(Survey {
        detected: Detected {
            mtu,
            flannel,
            net_conf: config.conf,
            calico,
            template,
            subnet_lens: nodes
                .iter()
                .flat_map(|node| &node.pod_cidrs)
                .filter(|cidr| matches!(cidr, ipnet::IpNet::V4(_)))
                .map(ipnet::IpNet::prefix_len)
                .collect(),
            kube_service_address: kube_service_address(client).await?,
        },
        net_conf_error: config.error,
        net_conf_forbidden: config.forbidden,
        finishing,
        calico_pods,
        agents: sets.iter().any(|set| set.name_any() == crate::names::AGENT),
        addon_managed,
        datastore,
        server: server(client).await?,
        windows: foreign.to_vec(),
        workloads,
    })
}

async fn data_of(maps: &Api<ConfigMap>, name: &str) -> Result<Option<BTreeMap<String, String>>> {
    if name.is_empty() {
        return Ok(None);
    }
    let map = found(read(format!("read ConfigMap {name}"), maps.get(name)).await)?;
    Ok(map.and_then(|map| map.data))
}

/// flannel's configuration, or why it isn't known.
#[derive(Default)]
struct Config {
    conf: Option<NetConf>,
    error: Option<String>,
    forbidden: bool,
}

async fn net_conf(client: &Client, daemon: &FlannelDaemon) -> Result<Config> {
    let namespace = &daemon.daemon_set.namespace;
    let text = match &daemon.config_secret {
        None => {
            let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
            let data = data_of(&maps, &daemon.config_map).await?;
            data.and_then(|mut data| data.remove(&daemon.config_key))
        }
        Some(name) => {
            let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
            match found(read(format!("read Secret {name}"), secrets.get(name)).await) {
                Ok(secret) => secret
                    .and_then(|secret| secret.data)
                    .and_then(|mut data| data.remove(&daemon.config_key))
                    .map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned()),
                Err(error) if error.is_forbidden() => {
                    return Ok(Config { forbidden: true, ..Config::default() });
                }
                Err(error) => return Err(error),
            }
        }
    };
    Ok(match text.as_deref().map(discover::net_conf) {
        Some(Ok(conf)) => Config { conf: Some(conf), ..Config::default() },
        Some(Err(error)) => Config { error: Some(error.to_string()), ..Config::default() },
        None => Config::default(),
    })
}

async fn kube_service_address(client: &Client) -> Result<Option<String>> {
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let kubernetes = found(read("read Service default/kubernetes", services.get("kubernetes")).await)?;
    Ok(kubernetes.and_then(|service| {
        let spec = service.spec?;
        let port = spec.ports.as_deref().and_then(<[_]>::first).map_or(443, |port| port.port);
        Some(format!("{}:{port}", spec.cluster_ip?))
    }))
}

async fn datastore(client: &Client) -> Result<Datastore> {
    let pools: Api<IPPool> = Api::all(client.clone());
    let Some(pools) = found(read("list Calico's pools", pools.list(&ListParams::default())).await)? else {
        let groups = read("list API groups", client.list_api_groups()).await?.groups;
        let only_native = groups.iter().any(|group| group.name == "projectcalico.org");
        return Ok(Datastore { only_native, ..Datastore::default() });
    };
    let mut blocks = Vec::new();
    let take = |block: Block| {
        if let Block { spec: BlockSpec { cidr, affinity, deleted: false } } = block {
            blocks.extend(cidr.parse().ok().map(|cidr| (cidr, affinity)));
        }
    };
    found(pages::each::<IPAMBlock, Block>(client, "list Calico's blocks", take).await)?;
    let felix: Api<FelixConfiguration> = Api::all(client.clone());
    let felix = found(read("read Felix's configuration", felix.get(names::FELIX)).await)?;
    Ok(Datastore {
        definitions: true,
        only_native: false,
        pools: pools.items.into_iter().map(|pool| (pool.name_any(), pool.spec)).collect(),
        blocks,
        felix: felix.map(|felix| felix.spec),
    })
}

/// A block, but for what is in it.
#[derive(Deserialize)]
struct Block {
    spec: BlockSpec,
}

#[derive(Deserialize)]
struct BlockSpec {
    cidr: String,
    affinity: Option<String>,
    #[serde(default)]
    deleted: bool,
}

async fn server(client: &Client) -> Result<Server> {
    let info = read("read the API server's version", client.apiserver_version()).await?;
    let number = |text: &str| text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok();
    let jobs: Api<Job> = Api::all(client.clone());
    let jobs = read("list Jobs", jobs.list(&ListParams::default())).await?.items;
    Ok(Server {
        version: number(&info.major).zip(number(&info.minor)),
        controllers: jobs.iter().filter(|job| migrates(job)).map(full_name).collect(),
        ..Server::default()
    })
}

fn full_name(job: &Job) -> String {
    format!("{}/{}", job.namespace().unwrap_or_default(), job.name_any())
}

/// Whether a Job that isn't over runs Calico's own migration.
fn migrates(job: &Job) -> bool {
    let over = job.status.iter().flat_map(|status| status.conditions.iter().flatten()).any(|condition| {
        matches!(condition.type_.as_str(), "Complete" | "Failed") && condition.status == "True"
    });
    let containers =
        job.spec.as_ref().and_then(|spec| spec.template.spec.as_ref()).map(|spec| &spec.containers);
    !over
        && containers.into_iter().flatten().any(|container| {
            let image = container.image.as_deref().unwrap_or_default();
            let mut variables = container.env.iter().flatten();
            image.contains("flannel-migration-controller")
                || variables.any(|variable| {
                    variable.name == "ENABLED_CONTROLLERS"
                        && variable.value.as_deref().is_some_and(|value| value.contains("flannelmigration"))
                })
        })
}

/// What runs where, if some node is to be drained.
async fn workloads(client: &Client, options: &Options, known: &[Arc<NodeFacts>]) -> Result<Workloads> {
    let drains = options.policy.strategy == Strategy::Drain
        || known.iter().any(|node| node.view.strategy.get() == Some(&Strategy::Drain));
    if !drains {
        return Ok(Workloads::default());
    }
    let (mut nodes, mut pods) = (Vec::new(), Vec::new());
    pages::each::<Node, Node>(client, "list nodes", |node| nodes.push(drain::trimmed_node(node))).await?;
    pages::each::<Pod, Pod>(client, "list pods", |pod| pods.push(drain::trimmed_pod(pod))).await?;
    let budgets: Api<PodDisruptionBudget> = Api::all(client.clone());
    let budgets = read("list PodDisruptionBudgets", budgets.list(&ListParams::default())).await?.items;
    Ok(Workloads { nodes, pods, budgets })
}

/// Once a node is migrated, what Felix uses there holds: this process's own node may have no flannel device any more.
fn felix_mtu(datastore: &Datastore, nodes: &[Arc<NodeFacts>]) -> Option<(u32, String)> {
    let begun = nodes.iter().any(|node| node.view.network.get().is_some());
    let mtu = datastore.felix.as_ref().filter(|_| begun)?.vxlan_mtu.filter(|mtu| *mtu > 0)?;
    Some((mtu, "FelixConfiguration default".to_owned()))
}

/// The MTU that fits all nodes whose agents tell.
fn smallest_mtu(nodes: &[Arc<NodeFacts>], vni: u32) -> Option<(u32, String)> {
    let name = format!("flannel.{vni}");
    let mtus = nodes.iter().filter_map(|node| {
        let device = host(node)?.vxlan.iter().find(|device| device.name == name)?;
        Some((device.mtu, format!("device {name} of node {}", node.name)))
    });
    mtus.min()
}

/// The MTU of this node's VXLAN device, which all pods have: the process runs on the host's network.
fn device_mtu(interfaces: &Path, vni: u32) -> Option<(u32, String)> {
    [format!("flannel.{vni}"), "vxlan.calico".to_owned()].into_iter().find_map(|name| {
        let text = std::fs::read_to_string(interfaces.join(&name).join("mtu")).ok()?;
        Some((text.trim().parse().ok()?, format!("device {name} of this node")))
    })
}

/// Whether any node carries the migration's network label.
#[must_use]
pub fn begun(nodes: &[Arc<NodeFacts>]) -> bool {
    nodes.iter().any(|node| !node.view.network.is_absent())
}

/// Whether Calico is meant to run on some node already.
#[must_use]
pub fn calico_in_use(nodes: &[Arc<NodeFacts>]) -> bool {
    nodes.iter().any(|node| node.view.network.get() == Some(&flannel_migration_protocol::Network::Calico))
}

/// The label that moves DaemonSet pods; named here for messages.
pub const NETWORK_LABEL: &str = keys::NETWORK;
