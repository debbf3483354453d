//! Follows pods and nodes through the Kubernetes API, and tells the engine where the pods of its flows are. The API
//! server may be away for minutes: probing goes on with what was last known.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::oneshot;

use super::Error;
use super::engine::{Command, Endpoint};
use super::flow::{ECHO, Place, Slot};
use super::netns::Netns;
use super::pods::{Census, PodFacts};
use super::site::Site;
use super::workload::{NAMESPACE, NODE_PORT_SERVICE, SERVICE};

/// How long any request may take.
const REQUEST: Duration = Duration::from_secs(10);
/// The server ends a watch after this many seconds; one that fell silent is noticed a little later.
const WATCH: u32 = 20;
/// Time between looks at what no event tells of: a container's namespace that is not there yet, a node's that is new.
const LOOK: Duration = Duration::from_millis(100);
/// Time before the next try after the API server failed to answer.
const RETRY: Duration = Duration::from_millis(500);

/// A client for the cluster, with limits on every request.
pub async fn client(kubeconfig: &Path) -> Result<Client, Error> {
    let file = Kubeconfig::read_from(kubeconfig).map_err(Error::Kubeconfig)?;
    let mut config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .map_err(Error::Kubeconfig)?;
    config.connect_timeout = Some(REQUEST);
    // A watch is a request too: longer than the server lets one live.
    config.read_timeout = Some(Duration::from_secs(u64::from(WATCH)) + REQUEST);
    config.default_retry = false;
    Client::try_from(config).map_err(|source| Error::Api { what: "make a client", source: Box::new(source) })
}

/// What the watching thread knows, shared with those who ask.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) pods: Census,
    pub(super) nodes: Census,
    /// The slots whose pod the engine has been told of.
    pub(super) bound: BTreeSet<Slot>,
    /// Whether the first lists are complete: a count that begins before knows too little.
    pods_listed: bool,
    nodes_listed: bool,
}

/// Shared knowledge, and a signal whenever it grew.
#[derive(Debug, Default)]
pub(super) struct Shared {
    known: Mutex<Known>,
    grew: Condvar,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until pods and nodes are listed and all `slots` bound; the slots that are not when time is up.
    pub(super) fn wait_bound(&self, slots: &BTreeSet<Slot>, limit: Duration) -> BTreeSet<Slot> {
        let listed = |known: &Known| known.pods_listed && known.nodes_listed;
        let missing = |known: &mut Known| !listed(known) || !slots.is_subset(&known.bound);
        let (known, _) =
            self.grew.wait_timeout_while(self.lock(), limit, missing).unwrap_or_else(PoisonError::into_inner);
        slots.difference(&known.bound).cloned().collect()
    }
}

/// The addresses of the Services that flows go to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Services {
    pub(super) cluster: std::net::SocketAddr,
    pub(super) cluster_v6: Option<std::net::SocketAddr>,
    pub(super) node_port: u16,
}

async fn services(client: &Client) -> Result<Services, Error> {
    let api: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
    let get = async |name: &'static str| match tokio::time::timeout(REQUEST, api.get(name)).await {
        Ok(Ok(service)) => Ok(service.spec.unwrap_or_default()),
        Ok(Err(source)) => Err(Error::Api { what: "read the Services", source: Box::new(source) }),
        Err(_) => Err(Error::Silent { what: "read the Services" }),
    };
    let cluster = get(SERVICE).await?;
    let node_port = get(NODE_PORT_SERVICE).await?;
    let address = cluster.cluster_ip.and_then(|address| address.parse().ok());
    let all = cluster.cluster_ips.iter().flatten().filter_map(|address| address.parse().ok());
    let v6 = all.into_iter().find(IpAddr::is_ipv6);
    let port = cluster.ports.iter().flatten().find_map(|port| u16::try_from(port.port).ok());
    let open = node_port.ports.iter().flatten().find_map(|port| u16::try_from(port.node_port?).ok());
    match (address, port, open) {
        (Some(address), Some(port), Some(node_port)) => {
            let at = |address| std::net::SocketAddr::new(address, port);
            Ok(Services { cluster: at(address), cluster_v6: v6.map(at), node_port })
        }
        _ => Err(Error::NotDeployed(format!("Services {SERVICE} and {NODE_PORT_SERVICE} have no addresses"))),
    }
}

/// The watching thread's work.
pub(super) struct Watch {
    pub(super) site: Site,
    pub(super) shared: Arc<Shared>,
    pub(super) engine: Sender<Command>,
    pub(super) origin: Instant,
    pub(super) stop: oneshot::Receiver<()>,
}

/// What a slot's pod was bound by; another value means to look again.
type Bound = (String, Option<String>);

impl Watch {
    /// Reads the Services, reports them, and watches until told to stop.
    pub(super) fn run(self, found: &Sender<Result<Services, Error>>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = found.send(Err(Error::Thread(error)));
                return;
            }
        };
        runtime.block_on(async {
            let ready = async {
                let client = client(&self.site.kubeconfig).await?;
                let services = services(&client).await?;
                Ok((client, services))
            };
            match ready.await {
                Ok((client, services)) => {
                    let _ = found.send(Ok(services));
                    self.watch(client).await;
                }
                Err(error) => {
                    let _ = found.send(Err(error));
                }
            }
        });
    }

    async fn watch(mut self, client: Client) {
        let config = || watcher::Config::default().timeout(WATCH);
        let pods = patient(watcher(Api::<Pod>::namespaced(client.clone(), NAMESPACE), config()));
        let nodes = patient(watcher(Api::<Node>::all(client), config()));
        let (mut pods, mut nodes) = (Box::pin(pods), Box::pin(nodes));
        let (mut listed_pods, mut listed_nodes) = (BTreeSet::new(), BTreeSet::new());
        let mut bound = HashMap::new();
        let mut hosts = HashMap::new();
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                _ = &mut self.stop => return,
                Some(event) = pods.next() => {
                    let now = self.origin.elapsed();
                    let mut known = self.shared.lock();
                    known.pods_listed |= matches!(event, Event::InitDone);
                    take(&mut known.pods, event, PodFacts::read, &mut listed_pods, now);
                    drop(known);
                    self.bind(&mut bound);
                }
                Some(event) = nodes.next() => {
                    let now = self.origin.elapsed();
                    let mut known = self.shared.lock();
                    known.nodes_listed |= matches!(event, Event::InitDone);
                    take(&mut known.nodes, event, read_node, &mut listed_nodes, now);
                    drop(known);
                    self.shared.grew.notify_all();
                }
                _ = look.tick() => {
                    self.bind(&mut bound);
                    self.bind_hosts(&mut hosts);
                }
            }
        }
    }

    /// Tells the engine of every pod of a flow that runs with an address and was not told of yet.
    fn bind(&self, bound: &mut HashMap<Slot, Bound>) {
        let mut known = self.shared.lock();
        for node in &self.site.nodes {
            for slot in ECHO.map(|name| Slot::daemon(name, &node.name)) {
                let Some(pod) = known.pods.occupant(&slot) else { continue };
                let (Some(address), Some(container)) = (pod.address, pod.container.as_ref()) else {
                    continue;
                };
                let v6 = pod.address_v6;
                let wanted = (format!("{}/{address}/{v6:?}", pod.uid), Some(container.clone()));
                if bound.get(&slot) == Some(&wanted) {
                    continue;
                }
                // Not there yet, or gone again: the next look will tell.
                let Ok(netns) = Netns::open_container(&node.root, container) else { continue };
                let endpoint = Endpoint { netns: Arc::new(netns), address: Some(address) };
                if v6.is_some() {
                    let endpoint = Endpoint { address: v6, ..endpoint.clone() };
                    let _ = self.engine.send(Command::Bind(Place::PodV6(slot.clone()), endpoint));
                }
                let _ = self.engine.send(Command::Bind(Place::Pod(slot.clone()), endpoint));
                bound.insert(slot.clone(), wanted);
                known.bound.insert(slot);
            }
        }
        self.shared.grew.notify_all();
    }

    /// Tells the engine of every node's namespace, and again when the node got a new one by a reboot.
    fn bind_hosts(&self, hosts: &mut HashMap<String, Arc<Netns>>) {
        for node in &self.site.nodes {
            if hosts.get(&node.name).is_some_and(|netns| !netns.differs_from(&node.netns)) {
                continue;
            }
            let Ok(netns) = Netns::open(&node.netns).map(Arc::new) else { continue };
            hosts.insert(node.name.clone(), Arc::clone(&netns));
            let endpoint = Endpoint { netns, address: Some(node.address) };
            let _ = self.engine.send(Command::Bind(Place::Host(node.name.clone()), endpoint));
        }
    }
}

/// The events of a watch, its errors waited out.
fn patient<K: 'static>(
    stream: impl Stream<Item = watcher::Result<Event<K>>>,
) -> impl Stream<Item = Event<K>> {
    stream.filter_map(async |event| {
        if event.is_err() {
            tokio::time::sleep(RETRY).await;
        }
        event.ok()
    })
}

fn take<K: ResourceExt>(
    census: &mut Census,
    event: Event<K>,
    read: impl Fn(&K) -> Option<PodFacts>,
    listed: &mut BTreeSet<String>,
    now: Duration,
) {
    match event {
        Event::Init => listed.clear(),
        Event::InitApply(object) => {
            listed.extend(object.uid());
            if let Some(facts) = read(&object) {
                census.see(facts, now);
            }
        }
        Event::InitDone => census.keep_only(listed, now),
        Event::Apply(object) => {
            if let Some(facts) = read(&object) {
                census.see(facts, now);
            }
        }
        Event::Delete(object) => {
            if let Some(uid) = object.uid() {
                census.miss(&uid, now);
            }
        }
    }
}

/// A node as a workload of one member.
fn read_node(node: &Node) -> Option<PodFacts> {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = conditions.into_iter().any(|found| found.type_ == "Ready" && found.status == "True");
    Some(PodFacts {
        uid: node.uid()?,
        workload: format!("Node/{}", node.name_any()),
        node: Some(node.name_any()),
        address: None,
        address_v6: None,
        container: None,
        restarts: 0,
        ready,
        evicted: false,
        leaving: node.metadata.deletion_timestamp.is_some(),
    })
}
