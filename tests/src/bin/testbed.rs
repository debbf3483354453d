//! `hack/testbed`: a real cluster on one machine, from the command line.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use flannel_migration_tests::{
    bed::{self, Bed, control, forward, node, teardown},
    images, matrix,
    migration::{self, Outcome, Request},
    parts::{
        self, VersionArgs, Versions,
        sources::{self, Origin},
        stacks,
    },
    probe, programs, requirements,
    shape::{Cidr, KubeProxy, Layout, NodeShape, Rules, Shape},
};

/// A real Kubernetes cluster with flannel on this machine: etcd, API server, kubelets, containerd, in namespaces.
#[derive(Parser)]
#[command(name = "hack/testbed", version)]
struct Cli {
    /// Which test bed; several can run side by side.
    #[arg(long, default_value = "main", global = true)]
    name: String,
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Bring a cluster up: control plane, nodes, flannel.
    Up(Box<UpArgs>),
    /// Take it away: processes, namespaces, mounts, files.
    Down,
    /// What runs, where, and how it does.
    Status,
    /// Run kubectl as the administrator.
    #[command(disable_help_flag = true)]
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run a program on a node.
    Exec {
        node: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        args: Vec<String>,
    },
    /// Print what a shell evaluates: eval "$(hack/testbed env)".
    Env,
    /// Import an image archive into every node; without one, build and import the project's own images.
    LoadImage { archive: Option<PathBuf> },
    /// Apply Calico's stock flannel-migration manifest, unchanged.
    Calico,
    /// Print what the network has left on the nodes and in the API, to compare clusters: no addresses, hashes, names of pods.
    Footprint,
    /// Measure traffic until the time is over or Ctrl-C is pressed.
    Probe(ProbeArgs),
    /// Add a node while the cluster runs.
    AddNode { node: String },
    /// End a node for good.
    RemoveNode { node: String },
    /// Cut a node's power and start it again.
    Reboot { node: String },
    /// Stop the API server.
    StopApi,
    /// Start the API server again.
    StartApi,
    /// Bring a cluster up, migrate it under traffic, and say whether every promise was kept.
    Demo(Box<DemoArgs>),
    /// Build all parts and images of these versions into the cache and stop.
    Build {
        #[command(flatten)]
        versions: VersionArgs,
    },
    /// List the versions that can be had: what is pinned, what sources add, and what is built already.
    Versions {
        /// A folder with archives or trees of sources, or one of them; repeatable, beside those that `PARTS_SOURCES` names.
        #[arg(long, value_name = "PATH")]
        source: Vec<PathBuf>,
    },
    /// Migrate a cluster of each combination of versions and write docs/versions.md (hack/matrix).
    #[command(hide = true)]
    Matrix {
        /// Run these also when they are done.
        #[arg(long)]
        again: bool,
        /// Only these combinations.
        names: Vec<String>,
    },
    /// Forward loopback connections to an API server (used by `up`).
    #[command(hide = true)]
    Forward { namespace: PathBuf, port_file: PathBuf },
}

#[derive(Args)]
struct UpArgs {
    /// How many nodes, named n1, n2, ...
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// The pod network.
    #[arg(long, default_value = "10.244.0.0/16")]
    pod_cidr: Cidr,
    /// Length of a node's share of it.
    #[arg(long, default_value_t = 24)]
    node_prefix: u8,
    /// flannel's VXLAN network identifier.
    #[arg(long, default_value_t = 1)]
    vni: u32,
    /// flannel's UDP port.
    #[arg(long, default_value_t = 8472)]
    port: u16,
    /// flannel's names, or Canal.
    #[arg(long, value_enum, default_value_t = Layout::Current)]
    layout: Layout,
    /// How flannel writes its rules.
    #[arg(long, value_enum, default_value_t = Rules::Iptables)]
    rules: Rules,
    /// IPv6 beside IPv4.
    #[arg(long)]
    dual_stack: bool,
    /// `rp_filter` of one node, as NODE=0|1|2; repeatable. Default: 1, strict.
    #[arg(long, value_name = "NODE=VALUE")]
    rp_filter: Vec<String>,
    /// A node with the control-plane label and taint; repeatable.
    #[arg(long, value_name = "NODE")]
    control_plane: Vec<String>,
    /// kube-proxy's mode.
    #[arg(long, value_enum, default_value_t = KubeProxy::Iptables)]
    kube_proxy: KubeProxy,
    #[command(flatten)]
    versions: VersionArgs,
}

#[derive(Args)]
struct ProbeArgs {
    /// How long, in seconds; without it until Ctrl-C.
    #[arg(long)]
    seconds: Option<u64>,
    /// Milliseconds between two probes of a flow.
    #[arg(long, default_value_t = 20)]
    interval: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct DemoArgs {
    #[command(flatten)]
    shape: UpArgs,
    /// in-place or drain; from STRATEGY when that is set.
    #[arg(long, env = "STRATEGY", default_value = "in-place", value_parser = ["in-place", "drain"])]
    strategy: String,
    /// How many nodes at a time, a number or a per cent.
    #[arg(long, env = "MAX_UNAVAILABLE", default_value = "1")]
    max_unavailable: String,
    /// Pods on every node.
    #[arg(long)]
    pods_per_node: Option<u32>,
    /// Milliseconds between two probes of a flow.
    #[arg(long, default_value_t = 20)]
    interval: u64,
    /// Leave the cluster up.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let name = cli.name.as_str();
    match cli.command {
        Action::Up(args) => {
            let program = std::env::current_exe().context("can't find myself")?;
            if let Err(error) = Bed::up(name, shape(&args)?, &program) {
                return Err(
                    error.context(format!("not up; look at it, then: hack/testbed --name {name} down"))
                );
            }
        }
        Action::Down => teardown::down(name)?,
        Action::Status => status()?,
        Action::Kubectl { args } => {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            return exit_code(&mut Bed::open(name)?.kubectl_command(&args)?);
        }
        Action::Exec { node, args } => {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            return exit_code(&mut Bed::open(name)?.exec_command(&node, &args)?);
        }
        Action::Env => println!("export KUBECONFIG={}", Bed::open(name)?.plan.kubeconfig().display()),
        Action::LoadImage { archive: Some(archive) } => Bed::open(name)?.load_image(&archive)?,
        Action::LoadImage { archive: None } => Bed::open(name)?.load_project_images()?,
        Action::Calico => Bed::open(name)?.apply_calico()?,
        Action::Footprint => {
            for line in migration::footprint::look(&Bed::open(name)?)? {
                println!("{line}");
            }
        }
        Action::Probe(args) => measure(&Bed::open(name)?, &args)?,
        Action::AddNode { node } => Bed::open(name)?.add_node(NodeShape::worker(&node))?,
        Action::RemoveNode { node } => Bed::open(name)?.remove_node(&node)?,
        Action::Reboot { node } => Bed::open(name)?.reboot(&node)?,
        Action::StopApi => control::stop_apiserver(&Bed::open(name)?)?,
        Action::StartApi => {
            let bed = Bed::open(name)?;
            control::start_apiserver(&bed)?;
            control::wait(&bed)?;
        }
        Action::Versions { source } => versions(&source)?,
        Action::Build { versions } => {
            requirements::root()?;
            let versions = Versions::of(&versions);
            versions.resolve()?;
            requirements::ensure()?;
            let images = images::build(&parts::build(&versions)?)?;
            images::echo()?;
            images::product(&images.base)?;
        }
        Action::Demo(args) => return demo(if name == "main" { "demo" } else { name }, &args),
        Action::Matrix { again, names } => {
            let program = std::env::current_exe().context("can't find myself")?;
            let docs = programs::source()?.join("docs");
            if !matrix::sweep(&docs, &names, again, &program)? {
                return Ok(ExitCode::FAILURE);
            }
        }
        Action::Forward { namespace, port_file } => forward::serve(&namespace, &port_file)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn shape(args: &UpArgs) -> Result<Shape> {
    let mut nodes = NodeShape::numbered(args.nodes);
    let mut find = |name: &str, option: &str| match nodes.iter_mut().position(|node| node.name == name) {
        Some(position) => Ok(position),
        None => bail!("{option}: no node {name:?} among the {} nodes n1, n2, ...", args.nodes),
    };
    let mut strictness = Vec::new();
    for text in &args.rp_filter {
        let (name, value) =
            text.split_once('=').with_context(|| format!("--rp-filter {text:?}: NODE=0|1|2"))?;
        let value: u8 = value.parse().ok().with_context(|| format!("--rp-filter {text:?}: NODE=0|1|2"))?;
        strictness.push((find(name, "--rp-filter")?, value));
    }
    let control_plane: Vec<usize> =
        args.control_plane.iter().map(|name| find(name, "--control-plane")).collect::<Result<_>>()?;
    for (position, node) in nodes.iter_mut().enumerate() {
        node.control_plane = control_plane.contains(&position);
        if let Some((_, value)) = strictness.iter().find(|(of, _)| *of == position) {
            node.rp_filter = *value;
        }
    }
    Ok(Shape {
        nodes,
        pod_cidr: args.pod_cidr.clone(),
        node_prefix: args.node_prefix,
        vni: args.vni,
        port: args.port,
        layout: args.layout,
        rules: args.rules,
        dual_stack: args.dual_stack,
        kube_proxy: args.kube_proxy,
        versions: Versions::of(&args.versions),
    })
}

fn versions(more: &[PathBuf]) -> Result<()> {
    for stack in stacks::STACKS {
        for source in sources::versions(stack, more)? {
            let default = if source.version == stack.default { ", default" } else { "" };
            let built = if parts::build::is_built(stack, &source) { ", built" } else { "" };
            let origin = match &source.origin {
                Origin::Pinned(_) => "pinned".to_owned(),
                Origin::Archive(path) | Origin::Tree(path) => path.display().to_string(),
            };
            // A reader may have seen enough: that ends this, and is no reason to panic.
            writeln!(io::stdout(), "{:<12} {:<18} {origin}{default}{built}", stack.name, source.version)?;
        }
    }
    Ok(())
}

fn demo(name: &str, args: &DemoArgs) -> Result<ExitCode> {
    let program = std::env::current_exe().context("can't find myself")?;
    teardown::down(name)?;
    let outcome = migrate(name, args, &program);
    if args.keep {
        eprintln!("the cluster stays up; end it with: hack/testbed --name {name} down");
    } else {
        teardown::down(name)?;
    }
    let outcome = outcome?;
    Ok(if outcome.kept() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn migrate(name: &str, args: &DemoArgs, program: &Path) -> Result<Outcome> {
    let bed = Bed::up(name, shape(&args.shape)?, program)?;
    bed.load_project_images()?;
    let request = Request {
        strategy: &args.strategy,
        max_unavailable: &args.max_unavailable,
        pods_per_node: args.pods_per_node,
        interval: Duration::from_millis(args.interval),
        limit: Duration::from_mins(10),
    };
    let outcome = migration::run(&bed, &request, |line| eprintln!("demo: {line}"))?;
    println!("\n{}", outcome.table());
    let columns = format!("{},{}", migration::NETWORK_LABEL, migration::STATE_LABEL);
    println!("$ kubectl get nodes -L {columns}\n{}", bed.kubectl(&["get", "nodes", "-L", &columns])?);
    Ok(outcome)
}

fn status() -> Result<()> {
    let names = bed::names()?;
    if names.is_empty() {
        println!("no test bed is up");
    }
    for name in names {
        match Bed::open(&name) {
            Ok(bed) => {
                println!("{name}: KUBECONFIG={}", bed.plan.kubeconfig().display());
                for record in &bed.nodes {
                    let node = &record.shape.name;
                    let holder =
                        node::holder(&bed, node).map_or("not running".to_owned(), |pid| format!("pid {pid}"));
                    println!("  {node}: {} {holder}", bed.address(node)?);
                }
                match bed.kubectl(&["get", "nodes,pods", "--all-namespaces", "-o", "wide"]) {
                    Ok(text) => println!("{text}"),
                    Err(error) => println!("  the API doesn't answer: {error:#}"),
                }
            }
            Err(error) => println!("{name}: {error:#}"),
        }
    }
    Ok(())
}

fn measure(bed: &Bed, args: &ProbeArgs) -> Result<()> {
    bed.load_echo()?;
    probe::deploy_to(&bed.plan.kubeconfig(), &probe::Workloads::default(), Duration::from_mins(3))?;
    let report = probe::run_for(
        bed.site()?,
        probe::Options { interval: Duration::from_millis(args.interval), ..probe::Options::default() },
        args.seconds.map(Duration::from_secs),
    )?;
    if args.json {
        println!("{}", report.json()?);
    } else {
        println!("{}", report.table());
    }
    Ok(())
}

/// Runs with our own terminal and passes the exit status on.
fn exit_code(command: &mut Command) -> Result<ExitCode> {
    let status = command
        .status()
        .with_context(|| format!("can't start {}", command.get_program().to_string_lossy()))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
