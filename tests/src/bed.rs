//! A real cluster on one machine: its nodes are network, mount and UTS namespaces.

pub mod cgroup;
pub mod containerd;
pub mod control;
pub mod daemon;
pub mod flannel;
pub mod forward;
pub mod layout;
mod net;
pub mod node;
mod secrets;
pub mod teardown;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    cache, debian,
    images::{self, Images},
    parts::{self, Parts},
    requirements, run,
    say::Progress,
    shape::{self, Layout, NodeShape, Shape},
};
use layout::Plan;

/// Room that a test bed with three nodes and its tests need, in bytes.
const ROOM: u64 = 4 << 30;

/// A test bed that is up, or coming up.
#[derive(Debug, Clone)]
pub struct Bed {
    /// Names, addresses, paths.
    pub plan: Plan,
    /// What was asked for.
    pub shape: Shape,
    /// The nodes that are there now.
    pub nodes: Vec<NodeRecord>,
    /// The programs it runs.
    pub parts: Parts,
    /// The images it runs.
    pub images: Images,
}

/// A node of a test bed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// What was asked for.
    pub shape: NodeShape,
    /// Its number, from 1, of which its address is made; never given to another node.
    pub number: u8,
}

/// What `bed.json` holds.
#[derive(Serialize, Deserialize)]
struct Record {
    index: u8,
    shape: Shape,
    nodes: Vec<NodeRecord>,
}

impl Bed {
    /// Brings a cluster of this shape up under `name`. `testbed` is the program whose `forward` command makes the
    /// API reachable from the machine.
    ///
    /// What was begun stays when this fails, so that it can be looked at; [`teardown::down`] removes it.
    pub fn up(name: &str, shape: Shape, testbed: &Path) -> Result<Self> {
        let (bed, progress) = Self::begin(name, shape, testbed, true)?;
        progress.step(&format!("{} nodes", bed.nodes.len()));
        // Side by side: most of a node's start is waiting.
        std::thread::scope(|scope| {
            let nodes: Vec<_> =
                bed.nodes.iter().map(|node| scope.spawn(|| node::create(&bed, node))).collect();
            control::wait(&bed)?;
            nodes
                .into_iter()
                .try_for_each(|node| node.join().unwrap_or_else(|_| bail!("a node's thread ended")))
        })?;
        progress.step("flannel");
        bed.apply(&flannel::manifest(&bed.parts, &bed.shape)?)?;
        progress.step("nodes become Ready, pods reach each other");
        bed.wait_ready()?;
        progress.done(&format!("up; KUBECONFIG={}", bed.plan.kubeconfig().display()));
        Ok(bed)
    }

    /// Brings only the control plane of a cluster of this shape up: a real API server with all its controllers, and no nodes.
    pub fn up_without_nodes(name: &str, shape: Shape, testbed: &Path) -> Result<Self> {
        let (bed, progress) = Self::begin(name, shape, testbed, false)?;
        control::wait(&bed)?;
        progress.done(&format!("up; KUBECONFIG={}", bed.plan.kubeconfig().display()));
        Ok(bed)
    }

    /// Networks and control plane; the API server may not answer yet.
    fn begin(name: &str, shape: Shape, testbed: &Path, with_nodes: bool) -> Result<(Self, Progress)> {
        shape::check_name("test bed name", name)?;
        shape.check()?;
        // Whoever isn't root may not even be able to read which versions there are.
        requirements::root()?;
        // What can't be had is said before anything is installed.
        shape.versions.resolve()?;
        requirements::ensure()?;
        let parts = parts::build(&shape.versions)?;
        let images = images::build(&parts)?;
        let progress = Progress::new(format!("testbed {name}"), if with_nodes { 5 } else { 2 });
        progress.step("networks");
        let mut bed = Self::reserve(name, shape, parts, images)?;
        if !with_nodes {
            bed.nodes.clear();
            bed.save()?;
        }
        net::create(&bed.plan)?;
        progress.step("control plane");
        control::start(&bed)?;
        let port = forward::start(&bed, testbed)?;
        secrets::write_for_machine(&bed.plan, port)?;
        Ok((bed, progress))
    }

    /// The test bed `name`, which must have been brought up.
    pub fn open(name: &str) -> Result<Self> {
        shape::check_name("test bed name", name)?;
        requirements::root()?;
        let path = layout::top().join(name).join("bed.json");
        let Ok(text) = fs::read_to_string(&path) else {
            bail!("no test bed {name:?} is up; bring it up with: hack/testbed --name {name} up");
        };
        let record: Record =
            serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))?;
        let parts = parts::build(&record.shape.versions)?;
        let images = images::build(&parts)?;
        let plan = Plan { bed: name.to_owned(), index: record.index };
        Ok(Self { plan, shape: record.shape, nodes: record.nodes, parts, images })
    }

    /// Adds a node while the cluster runs, and waits until it has registered.
    pub fn add_node(&mut self, shape: NodeShape) -> Result<()> {
        let mut wanted = self.shape.clone();
        wanted.nodes.push(shape.clone());
        wanted.check()?;
        let number = self.nodes.iter().map(|node| node.number).max().unwrap_or(0) + 1;
        let record = NodeRecord { shape, number };
        self.shape = wanted;
        self.nodes.push(record.clone());
        self.save()?;
        node::create(self, &record)?;
        self.wait_registered(&record)
    }

    /// Ends a node for good and deletes its Node.
    pub fn remove_node(&mut self, name: &str) -> Result<()> {
        self.node(name)?;
        node::stop(self, name)?;
        self.kubectl(&["delete", "node", name, "--ignore-not-found"])?;
        fs::remove_dir_all(self.plan.node_directory(name))?;
        self.nodes.retain(|node| node.shape.name != name);
        self.shape.nodes.retain(|node| node.name != name);
        self.save()
    }

    /// Cuts the power of a node and starts it again: its processes, network namespace and /run are new, its disks
    /// are kept.
    pub fn reboot(&self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        node::stop(self, name)?;
        node::start(self, node)
    }

    /// Waits until every node is Ready and flannel runs on all of them.
    pub fn wait_ready(&self) -> Result<()> {
        for node in &self.nodes {
            self.wait_registered(node)?;
        }
        let (namespace, name) = flannel::daemonset(&self.shape);
        let daemonset = format!("daemonset/{name}");
        self.kubectl(&["rollout", "status", "--namespace", namespace, &daemonset, "--timeout=120s"])?;
        self.kubectl(&["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=60s"])?;
        self.wait_overlay()
    }

    /// `kubectl args...` as the administrator; returns what it prints.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        run::output(&mut self.kubectl_command(args)?)
    }

    /// `kubectl args...` as the administrator, to be run.
    pub fn kubectl_command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(self.program("kubectl")?);
        command.env("KUBECONFIG", self.plan.kubeconfig()).args(args);
        Ok(command)
    }

    /// The JSON that `kubectl get args... -o json` prints.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        let mut all = vec!["get", "-o", "json"];
        all.extend(args);
        Ok(serde_json::from_str(&self.kubectl(&all)?)?)
    }

    /// Applies objects.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let list = serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        let mut command =
            self.kubectl_command(&["apply", "--server-side", "--force-conflicts", "-f", "-"])?;
        run::output_with_input(&mut command, &serde_json::to_vec(&list)?).map(drop)
    }

    /// Applies Calico's stock flannel-migration manifest: unchanged, or with IPv6 switched on where the cluster has it.
    pub fn apply_calico(&self) -> Result<()> {
        let stock = self.parts.manifest("calico", "calico.yaml")?;
        if self.shape.dual_stack {
            return self.apply(&flannel::calico_with_ipv6(&stock)?);
        }
        let mut command = self.kubectl_command(&["apply", "--server-side", "-f", "-"])?;
        run::output_with_input(&mut command, stock.as_bytes()).map(drop)
    }

    /// `program args...` in all namespaces of a node, to be run.
    pub fn exec_command(&self, node: &str, args: &[&str]) -> Result<Command> {
        self.node(node)?;
        let holder = node::holder(self, node)?;
        let mut command = Command::new("nsenter");
        for (flag, kind) in [("mount", "mnt"), ("uts", "uts"), ("net", "net")] {
            command.arg(format!("--{flag}=/proc/{holder}/ns/{kind}"));
        }
        command.arg("--").args(args);
        Ok(command)
    }

    /// Runs `program args...` in all namespaces of a node and returns what it prints.
    pub fn exec(&self, node: &str, args: &[&str]) -> Result<String> {
        run::output(&mut self.exec_command(node, args)?)
    }

    /// Runs a shell script in all namespaces of a node and returns what it prints. Its `nft` is that of the images: the
    /// machine's own may be older than what wrote the tables, and then can crash on them.
    pub fn shell(&self, node: &str, script: &str) -> Result<String> {
        let root = debian::base_directory()?;
        let script = format!("nft() {{ chroot {} nft \"$@\"; }}\n{script}", root.display());
        self.exec(node, &["sh", "-c", &script])
    }

    /// Imports an image archive into the containerd of every node.
    pub fn load_image(&self, archive: &Path) -> Result<()> {
        ensure!(archive.is_file(), "no image archive {}", archive.display());
        std::thread::scope(|scope| {
            let imports: Vec<_> = self
                .nodes
                .iter()
                .map(|node| scope.spawn(|| self.load_image_on(&node.shape.name, archive)))
                .collect();
            imports
                .into_iter()
                .try_for_each(|import| import.join().unwrap_or_else(|_| bail!("an import's thread ended")))
        })
    }

    /// Imports an image archive into the containerd of one node.
    pub fn load_image_on(&self, node: &str, archive: &Path) -> Result<()> {
        let containerd = node::containerd(self, node)?;
        let mut command = containerd.ctr(&["images", "import", "--snapshotter", "overlayfs"]);
        run::output(command.arg(archive)).map(drop)
    }

    /// Builds the project's own images where they changed and imports them into every node.
    pub fn load_project_images(&self) -> Result<()> {
        self.load_echo()?;
        let images = images::product(&self.images.base)?;
        self.load_image(&images.coordinator)?;
        self.load_image(&images.agent)
    }

    /// Builds the workload's image where it changed and imports it into every node.
    pub fn load_echo(&self) -> Result<()> {
        self.load_image(&images::echo()?)
    }

    /// A program of the Kubernetes stack.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        self.parts.program("kubernetes", name)
    }

    /// The node `name`.
    pub fn node(&self, name: &str) -> Result<&NodeRecord> {
        let names: Vec<&str> = self.nodes.iter().map(|node| node.shape.name.as_str()).collect();
        self.nodes
            .iter()
            .find(|node| node.shape.name == name)
            .with_context(|| format!("no node {name:?}; there are: {}", names.join(" ")))
    }

    /// A node's address on the switch.
    pub fn address(&self, name: &str) -> Result<Ipv4Addr> {
        Ok(self.plan.node(self.node(name)?.number))
    }

    /// What the prober needs to know.
    pub fn site(&self) -> Result<crate::probe::Site> {
        let nodes = self
            .nodes
            .iter()
            .map(|node| {
                let name = node.shape.name.clone();
                Ok(crate::probe::SiteNode {
                    root: node::stable_root(self, &name),
                    netns: self.plan.netns_path(&name),
                    address: IpAddr::V4(self.plan.node(node.number)),
                    address_v6: self.beside(self.plan.node(node.number)),
                    name,
                })
            })
            .collect::<Result<_>>()?;
        Ok(crate::probe::Site {
            kubeconfig: self.plan.kubeconfig(),
            nodes,
            outside_netns: self.plan.netns_path("outside"),
            outside_address: IpAddr::V4(self.plan.outside()),
            outside_address_v6: self.beside(self.plan.outside()),
        })
    }

    /// The IPv6 address beside one of IPv4, if the cluster has both families.
    fn beside(&self, address: Ipv4Addr) -> Option<IpAddr> {
        self.shape.dual_stack.then(|| self.plan.beside(address).parse().ok()).flatten()
    }

    fn reserve(name: &str, shape: Shape, parts: Parts, images: Images) -> Result<Self> {
        let top = layout::top();
        fs::create_dir_all(&top).with_context(|| format!("can't create {}", top.display()))?;
        let free = nix::sys::statvfs::statvfs(&top)?;
        let free = free.blocks_available() * free.fragment_size();
        ensure!(
            free >= ROOM,
            "no room: {} has {} MiB free, {} MiB are needed",
            top.display(),
            free >> 20,
            ROOM >> 20
        );
        let _lock = cache::lock(&top.join("lock"))?;
        let directory = top.join(name);
        ensure!(
            !directory.exists(),
            "the name {name:?} is taken: use it, or first: hack/testbed --name {name} down"
        );
        let taken = taken_indices(&top)?;
        let index = (1..=250).find(|index| !taken.contains(index)).context("250 test beds are up already")?;
        let nodes = (1..)
            .zip(&shape.nodes)
            .map(|(number, node)| NodeRecord { shape: node.clone(), number })
            .collect();
        let bed = Self { plan: Plan { bed: name.to_owned(), index }, shape, nodes, parts, images };
        fs::create_dir(&directory)?;
        bed.save()?;
        Ok(bed)
    }

    fn save(&self) -> Result<()> {
        let record = Record { index: self.plan.index, shape: self.shape.clone(), nodes: self.nodes.clone() };
        let path = self.plan.directory().join("bed.json");
        let unfinished = path.with_extension("new");
        fs::write(&unfinished, serde_json::to_string_pretty(&record)?)?;
        fs::rename(unfinished, path)?;
        Ok(())
    }

    fn wait_registered(&self, node: &NodeRecord) -> Result<()> {
        let name = &node.shape.name;
        run::wait_for(&format!("the node {name} registers"), Duration::from_mins(1), || {
            self.kubectl(&["get", "node", name, "-o", "name"]).map(|_| true)
        })?;
        if node.shape.control_plane {
            self.kubectl(&["label", "--overwrite", "node", name, "node-role.kubernetes.io/control-plane="])?;
        }
        Ok(())
    }

    /// The address of a node's VXLAN device: flannel's is the first of the podCIDR.
    fn tunnel_address(&self, node: &str) -> Result<String> {
        let path = match self.shape.layout {
            Layout::Calico => r"{.metadata.annotations.projectcalico\.org/IPv4VXLANTunnelAddr}",
            _ => "{.spec.podCIDR}",
        };
        let text = self.kubectl(&["get", "node", node, "-o", &format!("jsonpath={path}")])?;
        Ok(text.split('/').next().unwrap_or_default().to_owned())
    }

    /// flannel's rollout is done when its pods run, which is a moment before every node has every peer's route.
    fn wait_overlay(&self) -> Result<()> {
        for node in &self.nodes {
            for peer in self.nodes.iter().filter(|peer| *peer != node) {
                let (name, peer) = (&node.shape.name, &peer.shape.name);
                run::wait_for(
                    &format!("{name} reaches {peer} through the overlay"),
                    Duration::from_mins(1),
                    || {
                        let address = self.tunnel_address(peer)?;
                        self.exec(name, &["ping", "-c1", "-W1", "-q", &address]).map(|_| true)
                    },
                )?;
            }
        }
        Ok(())
    }
}

/// The test beds of this machine.
pub fn names() -> Result<Vec<String>> {
    let Ok(entries) = fs::read_dir(layout::top()) else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn taken_indices(top: &Path) -> Result<Vec<u8>> {
    let mut taken = Vec::new();
    for name in names()? {
        if let Ok(text) = fs::read_to_string(top.join(&name).join("bed.json"))
            && let Ok(record) = serde_json::from_str::<Record>(&text)
        {
            taken.push(record.index);
        }
    }
    Ok(taken)
}
