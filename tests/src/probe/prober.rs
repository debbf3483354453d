//! The prober as its users see it: started, asked, reset, stopped.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tokio::sync::oneshot;

use super::engine::{Command, Endpoint, Engine, Tally};
use super::flow::{ECHO, Flow, Place, Plan, Slot};
use super::netns::{Here, Netns};
use super::report::{FlowReport, MemberReport, Report, VERSION, by_kind};
use super::site::Site;
use super::watch::{Shared, Watch};
use super::{Error, Options};

/// How long the thread may take to answer; it looks at its orders every few milliseconds.
const ANSWER: Duration = Duration::from_secs(5);
/// How long flows get at the start to have their first answer: addresses are resolved, connections opened.
const SETTLE: Duration = Duration::from_secs(5);

/// The measuring part alone, without Kubernetes: flows between places that the user binds.
#[derive(Debug)]
pub struct Meter {
    commands: Sender<Command>,
    thread: Option<JoinHandle<io::Result<()>>>,
    options: Options,
}

impl Meter {
    /// Starts measuring `flows`. `observer` is the bound socket on which to serve [`super::Method::Observe`].
    pub fn start(flows: Vec<Flow>, observer: Option<UdpSocket>, options: Options) -> Result<Self, Error> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        let (commands, orders) = mpsc::channel();
        Self::with(flows, observer, options, commands, orders)
    }

    fn with(
        flows: Vec<Flow>,
        observer: Option<UdpSocket>,
        options: Options,
        commands: Sender<Command>,
        orders: Receiver<Command>,
    ) -> Result<Self, Error> {
        let engine = Engine::new(flows, observer, (options.interval, options.timeout), orders)
            .map_err(Error::Thread)?;
        let thread = std::thread::Builder::new()
            .name("prober".into())
            .spawn(move || engine.run())
            .map_err(Error::Thread)?;
        Ok(Self { commands, thread: Some(thread), options })
    }

    /// Says where a place is, now or anew.
    pub fn bind(&self, place: Place, endpoint: Endpoint) {
        let _ = self.commands.send(Command::Bind(place, endpoint));
    }

    /// The flows' figures up to now; workloads and nodes are empty.
    pub fn report(&self) -> Result<Report, Error> {
        Ok(self.render(self.ask(Command::Count)?))
    }

    /// Begins a new count.
    pub fn reset(&self) -> Result<(), Error> {
        self.ask(Command::Reset)
    }

    /// Waits until every flow has had an answer, then begins a new count. Flows that get none in time are measured
    /// all the same: their losses will show.
    pub fn settle(&self) -> Result<(), Error> {
        let end = Instant::now() + SETTLE;
        while Instant::now() < end {
            let tally = self.ask(Command::Count)?;
            if tally.flows.iter().all(|(_, counts)| counts.answered > 0) {
                break;
            }
            // Nothing to wait on but time: the next answers come with the next tick.
            std::thread::sleep(self.options.interval);
        }
        self.reset()
    }

    /// Sends no more, waits for what is under way, and reports.
    pub fn stop(mut self) -> Result<Report, Error> {
        let tally = self.ask(Command::Stop)?;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        Ok(self.render(tally))
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, Error> {
        let (answer, answered) = mpsc::channel();
        let gone = || Error::Thread(io::Error::other("it has ended, or does not answer"));
        self.commands.send(command(answer)).map_err(|_| gone())?;
        answered.recv_timeout(ANSWER + self.options.timeout).map_err(|_| gone())
    }

    fn render(&self, tally: Tally) -> Report {
        let flows: Vec<FlowReport> =
            tally.flows.into_iter().map(|(flow, counts)| FlowReport::new(flow, counts)).collect();
        Report {
            version: VERSION,
            made_at: jiff::Timestamp::now().to_string(),
            duration_ms: (tally.counted.as_secs_f64() * 1000.0).round(),
            interval_ms: self.options.interval.as_secs_f64() * 1000.0,
            timeout_ms: self.options.timeout.as_secs_f64() * 1000.0,
            kinds: by_kind(&flows),
            flows,
            workloads: Vec::new(),
            nodes: Vec::new(),
            prober: tally.resolution,
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let (answer, _) = mpsc::channel();
            let _ = self.commands.send(Command::Stop(answer));
            let _ = thread.join();
        }
    }
}

/// A running prober of a cluster. Dropping it ends it.
#[derive(Debug)]
pub struct Prober {
    meter: Meter,
    shared: Arc<Shared>,
    origin: Instant,
    stop: Option<oneshot::Sender<()>>,
    watch: Option<JoinHandle<()>>,
}

impl Prober {
    /// Starts probing the workloads of [`super::deploy`]; returns when every flow runs and counting has begun. Blocks
    /// the caller, and needs no async runtime.
    pub fn start(site: Site, options: Options) -> Result<Self, Error> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        let outside = open(&site.outside_netns)?;
        let heard_at = if site.outside_address_v6.is_some() {
            // Of both families, as long as it isn't bound to an address of one.
            IpAddr::from(Ipv6Addr::UNSPECIFIED)
        } else {
            site.outside_address
        };
        let observer = bind_observer(&outside, SocketAddr::new(heard_at, 0))
            .map_err(|source| Error::Netns { path: site.outside_netns.display().to_string(), source })?;
        let heard_port = observer.local_addr().map_err(Error::Thread)?.port();
        for node in &site.nodes {
            open(&node.netns)?;
        }
        let nodes: Vec<_> = site.nodes.iter().map(|node| (node.name.clone(), node.address)).collect();
        let nodes_v6: Vec<_> =
            site.nodes.iter().filter_map(|node| Some((node.name.clone(), node.address_v6?))).collect();
        let (outside_address, outside_v6) = (site.outside_address, site.outside_address_v6);
        let (commands, orders) = mpsc::channel();
        let (found, services) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let (shared, origin) = (Arc::new(Shared::default()), Instant::now());
        let watch =
            Watch { site, shared: Arc::clone(&shared), engine: commands.clone(), origin, stop: stopped };
        let watch = std::thread::Builder::new()
            .name("prober-watch".into())
            .spawn(move || watch.run(&found))
            .map_err(Error::Thread)?;
        let services = services
            .recv()
            .map_err(|_| Error::Thread(io::Error::other("the watching thread has ended")))??;

        let plan = Plan {
            nodes: &nodes,
            service: Some(services.cluster),
            node_port: Some(services.node_port),
            observer: Some(SocketAddr::new(outside_address, heard_port)),
            echo_port: options.echo_port,
            peers: options.peers,
            v6: false,
        };
        let v6 = Plan {
            nodes: &nodes_v6,
            service: services.cluster_v6,
            observer: outside_v6.map(|address| SocketAddr::new(address, heard_port)),
            v6: true,
            ..plan.clone()
        };
        let limit = options.ready_within;
        let flows = [plan.flows(), v6.flows()].concat();
        let meter = Meter::with(flows, Some(observer), options, commands, orders)?;
        meter.bind(Place::Outside, Endpoint { netns: outside, address: Some(outside_address) });
        let prober = Self { meter, shared, origin, stop: Some(stop), watch: Some(watch) };
        let slots: BTreeSet<Slot> =
            nodes.iter().flat_map(|(node, _)| ECHO.map(|name| Slot::daemon(name, node))).collect();
        let missing = prober.shared.wait_bound(&slots, limit);
        if !missing.is_empty() {
            let names: Vec<String> = missing.into_iter().map(|slot| Place::Pod(slot).to_string()).collect();
            return Err(Error::NotDeployed(format!("no running pod for {}", names.join(", "))));
        }
        prober.meter.settle()?;
        prober.reset()?;
        Ok(prober)
    }

    /// What was found since the start or the last reset.
    pub fn report(&self) -> Result<Report, Error> {
        Ok(self.complete(self.meter.report()?))
    }

    /// Begins a new count from the present state.
    pub fn reset(&self) -> Result<(), Error> {
        self.meter.reset()?;
        let mut known = self.shared.lock();
        let now = self.origin.elapsed();
        known.pods.reset(now);
        known.nodes.reset(now);
        Ok(())
    }

    /// Ends probing; the last report waits for the probes under way.
    pub fn stop(mut self) -> Result<Report, Error> {
        let tally = self.meter.ask(Command::Stop)?;
        let report = self.complete(self.meter.render(tally));
        self.end();
        Ok(report)
    }

    fn complete(&self, report: Report) -> Report {
        let known = self.shared.lock();
        let now = self.origin.elapsed();
        Report {
            workloads: MemberReport::all(known.pods.fates(now)),
            nodes: MemberReport::all(known.nodes.fates(now)),
            ..report
        }
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(watch) = self.watch.take() {
            let _ = watch.join();
        }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.end();
    }
}

/// Probes for a time, or until SIGINT or SIGTERM, whichever comes first; `None` means until a signal.
pub fn run_for(site: Site, options: Options, duration: Option<Duration>) -> Result<Report, Error> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(Error::Thread)?;
    let handle = signals.handle();
    let (told, tell) = mpsc::channel();
    let listener = std::thread::spawn(move || {
        for signal in signals.forever() {
            let _ = told.send(signal);
        }
    });
    let prober = Prober::start(site, options);
    let result = prober.and_then(|prober| {
        let _ = match duration {
            Some(duration) => tell.recv_timeout(duration).ok(),
            None => tell.recv().ok(),
        };
        prober.stop()
    });
    handle.close();
    let _ = listener.join();
    result
}

fn open(path: &Path) -> Result<Arc<Netns>, Error> {
    Netns::open(path)
        .map(Arc::new)
        .map_err(|source| Error::Netns { path: path.display().to_string(), source })
}

/// Binds the observing server's socket in its namespace. On a thread of its own, which ends there: the caller stays
/// where it is.
fn bind_observer(outside: &Arc<Netns>, address: SocketAddr) -> io::Result<UdpSocket> {
    let outside = Arc::clone(outside);
    let thread = std::thread::Builder::new().name("prober-outside".into()).spawn(move || {
        Here::default().enter(&outside)?;
        UdpSocket::bind(address)
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that binds it failed")))
}
