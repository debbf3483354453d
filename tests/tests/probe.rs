//! The prober's measuring part in network namespaces of its own: what it reports is what happened.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "all of this is a test"
)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use flannel_migration_tests::probe::netns::{Here, Netns};
use flannel_migration_tests::probe::{Endpoint, Flow, Kind, Meter, Method, Options, Place, Report, Slot};
use flannel_migration_tests::{probe::ledger::Cause, programs};

const INTERVAL: Duration = Duration::from_millis(10);

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status();
    let status = status.expect("the tests need `ip` of the package iproute2");
    assert!(status.success(), "ip {arguments}: {status}");
}

/// Hosts `a`, `b` and `c` on a switch, each a network namespace; gone with this value.
struct Lan {
    name: String,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Lan {
    const HOSTS: [&'static str; 3] = ["a", "b", "c"];

    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes network namespaces");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let lan = Self { name: format!("fmprobe{}x{number}", std::process::id()) };
        ip(&format!("netns add {}", lan.netns("switch")));
        ip(&format!("-n {} link add br0 type bridge", lan.netns("switch")));
        ip(&format!("-n {} link set br0 up", lan.netns("switch")));
        for host in Self::HOSTS {
            let (netns, switch) = (lan.netns(host), lan.netns("switch"));
            ip(&format!("netns add {netns}"));
            ip(&format!(
                "-n {switch} link add name port-{host} type veth peer name eth0 address {} netns {netns}",
                mac(host)
            ));
            ip(&format!("-n {switch} link set port-{host} master br0 up"));
            ip(&format!("-n {netns} address add {}/24 dev eth0", address(host)));
            ip(&format!("-n {netns} link set lo up"));
            ip(&format!("-n {netns} link set eth0 up"));
            // Fixed neighbours: an outage ends with its cause, not with the next ARP request a second later.
            for other in Self::HOSTS.iter().filter(|other| **other != host) {
                let neighbour = format!("{} lladdr {}", address(other), mac(other));
                ip(&format!("-n {netns} neighbour add {neighbour} dev eth0 nud permanent"));
            }
        }
        lan
    }

    fn netns(&self, host: &str) -> String {
        format!("{}{host}", self.name)
    }

    fn link(&self, host: &str, state: &str) {
        ip(&format!("-n {} link set port-{host} {state}", self.netns("switch")));
    }

    fn endpoint(&self, host: &str) -> Endpoint {
        let path = PathBuf::from("/run/netns").join(self.netns(host));
        Endpoint { netns: Arc::new(Netns::open(&path).unwrap()), address: Some(address(host)) }
    }

    /// Runs `work` in a host's namespace, on a thread that ends there.
    fn within<T: Send + 'static>(&self, host: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
        let netns = self.endpoint(host).netns;
        let thread = thread::spawn(move || {
            Here::default().enter(&netns).unwrap();
            work()
        });
        thread.join().unwrap()
    }

    fn echo(&self, host: &str) -> Echo {
        let echo = programs::build(programs::BED, &["echo"]).unwrap().join("echo");
        let mut command = Command::new("ip");
        let child = command.args(["netns", "exec", &self.netns(host)]).arg(echo).spawn().unwrap();
        let echo = Echo(child);
        let http = SocketAddr::new(address(host), 8080);
        self.within(host, move || while TcpStream::connect(http).is_err() {});
        echo
    }

    fn start(&self, flows: Vec<Flow>, observer: Option<UdpSocket>) -> Meter {
        let meter = Meter::start(flows, observer, options()).unwrap();
        for host in Self::HOSTS {
            meter.bind(place(host), self.endpoint(host));
        }
        meter.settle().unwrap();
        meter
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        for host in Self::HOSTS.into_iter().chain(["switch"]) {
            let _ = Command::new("ip").args(["netns", "delete", &self.netns(host)]).output();
        }
    }
}

struct Echo(Child);

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn address(host: &str) -> IpAddr {
    let last = Lan::HOSTS.iter().position(|found| *found == host).unwrap();
    IpAddr::from([192, 0, 2, u8::try_from(last).unwrap() + 1])
}

fn mac(host: &str) -> String {
    let last = Lan::HOSTS.iter().position(|found| *found == host).unwrap();
    format!("02:00:00:00:00:{last:02x}")
}

fn options() -> Options {
    Options { interval: INTERVAL, ..Options::default() }
}

fn place(host: &str) -> Place {
    Place::Pod(Slot { workload: "Test/lan".into(), place: host.into() })
}

fn flow(kind: Kind, from: &str, to: Place, method: Method) -> Flow {
    Flow { kind, from: place(from), to, nodes: vec![], method }
}

fn ping(from: &str, to: &str) -> Flow {
    flow(Kind::PodToPodOtherNode, from, place(to), Method::Ping)
}

fn stream(from: &str, to: &str) -> Flow {
    flow(Kind::LongLivedOtherNode, from, place(to), Method::Stream(7))
}

fn run(meter: &Meter, time: Duration) -> Report {
    thread::sleep(time);
    meter.report().unwrap()
}

/// Every way of probing, between `a` and `b`; `c` is the server outside.
fn every_method(lan: &Lan) -> (Vec<Flow>, UdpSocket) {
    let observer = lan.within("c", || UdpSocket::bind((address("c"), 0)).unwrap());
    let outside = Place::Address(observer.local_addr().unwrap());
    let service = Place::Address(SocketAddr::new(address("b"), 8080));
    let flows = vec![
        ping("a", "b"),
        ping("b", "a"),
        flow(Kind::PodToService, "a", service, Method::Connect),
        flow(Kind::PodToOutside, "a", outside, Method::Observe(address("a"))),
        stream("a", "b"),
    ];
    (flows, observer)
}

#[test]
fn nothing_is_lost_in_quiet() {
    let lan = Lan::new();
    let _echo = lan.echo("b");
    let (flows, observer) = every_method(&lan);
    let meter = lan.start(flows, Some(observer));
    thread::sleep(Duration::from_secs(3));
    let report = meter.stop().unwrap();
    println!("{}", report.table());
    assert_eq!((report.lost(), report.reconnects()), (0, 0), "{}", report.table());
    for flow in &report.flows {
        let due = report.prober.ticks / 5;
        assert!(
            flow.figures.sent + report.prober.skipped_probes >= due - 1,
            "{due} probes were due: {flow:?}"
        );
        assert!(flow.figures.sent <= due + 1, "{due} probes were due: {flow:?}");
    }
}

#[test]
fn a_link_that_is_down_costs_exactly_the_flows_through_it_for_as_long_as_it_is_down() {
    let lan = Lan::new();
    let _echo = lan.echo("b");
    let (mut flows, observer) = every_method(&lan);
    flows.extend([ping("a", "c"), ping("c", "a"), ping("b", "c")]);
    let meter = lan.start(flows, Some(observer));
    thread::sleep(Duration::from_millis(500));
    let down = std::time::Instant::now();
    lan.link("b", "down");
    thread::sleep(Duration::from_millis(700));
    lan.link("b", "up");
    let down = down.elapsed().as_secs_f64() * 1000.0;
    thread::sleep(Duration::from_millis(2500));
    let report = meter.stop().unwrap();
    println!("{}", report.table());
    let through = |place: &str| place == "lan@b" || place.starts_with("192.0.2.2:");
    for flow in &report.flows {
        let hurt = through(&flow.from) || through(&flow.to);
        assert_eq!(flow.figures.lost > 0, hurt, "{flow:?}");
        assert_eq!(flow.figures.longest_outage_ms > 0.0, hurt, "{flow:?}");
        // A connection recovers only with its next retransmission.
        if hurt && flow.kind == Kind::PodToPodOtherNode {
            let late = flow.figures.longest_outage_ms - down;
            assert!((-50.0..50.0).contains(&late), "down for {down} ms: {flow:?}");
            let expected = flow.figures.longest_outage_ms / 10.0;
            let lost = u32::try_from(flow.figures.lost + report.prober.skipped_probes).unwrap();
            assert!((expected - f64::from(lost)).abs() < 5.0, "one loss every 10 ms: {flow:?}");
        }
        if flow.kind == Kind::LongLivedOtherNode {
            assert_eq!(flow.figures.reconnects, 0, "a short outage breaks no connection: {flow:?}");
        }
    }
}

#[test]
fn a_connection_that_is_reset_is_opened_again_and_counted() {
    let lan = Lan::new();
    let (reset, told) = mpsc::channel::<()>();
    let listener = lan.within("b", || TcpListener::bind((address("b"), 7)).unwrap());
    let server = thread::spawn(move || {
        let (mut first, _) = listener.accept().unwrap();
        first.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        echo_until(&mut first, || told.try_recv().is_ok());
        socket2::SockRef::from(&first).set_linger(Some(Duration::ZERO)).unwrap();
        drop(first);
        let (mut second, _) = listener.accept().unwrap();
        second.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        echo_until(&mut second, || false);
    });
    let meter = lan.start(vec![stream("a", "b")], None);
    assert_eq!(run(&meter, Duration::from_millis(300)).reconnects(), 0);
    reset.send(()).unwrap();
    let report = run(&meter, Duration::from_millis(700));
    assert_eq!(report.reconnects(), 1, "{}", report.table());
    meter.reset().unwrap();
    let report = run(&meter, Duration::from_millis(300));
    assert_eq!((report.lost(), report.reconnects()), (0, 0), "it works again: {}", report.table());
    drop(meter);
    server.join().unwrap();
}

/// Echoes until told to stop, or until the other side closes.
fn echo_until(stream: &mut TcpStream, stop: impl Fn() -> bool) {
    let mut buffer = [0; 1024];
    while !stop() {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => stream.write_all(&buffer[..length]).unwrap(),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

#[test]
fn a_source_that_is_not_the_nodes_is_a_loss_that_says_so() {
    let lan = Lan::new();
    let (flows, observer) = every_method(&lan);
    let target = flows[3].to.clone();
    let elsewhere = Method::Observe(address("b"));
    let meter = lan.start(vec![flow(Kind::PodToOutside, "a", target, elsewhere)], Some(observer));
    let report = run(&meter, Duration::from_millis(300));
    let figures = &report.flows[0].figures;
    assert!(figures.sent > 10);
    assert!(
        figures.causes.get(&Cause::WrongSource).is_some_and(|lost| *lost >= figures.sent - 2),
        "{figures:?}"
    );
}

#[test]
fn a_flow_follows_its_target_to_another_address_and_a_refusal_is_told_from_silence() {
    let lan = Lan::new();
    let _echo = lan.echo("b");
    let nobody = Place::Address(SocketAddr::new(address("b"), 9));
    let refused = flow(Kind::PodToService, "a", nobody, Method::Connect);
    let meter = Meter::start(vec![ping("a", "b"), refused], None, options()).unwrap();
    meter.bind(place("a"), lan.endpoint("a"));
    let report = run(&meter, Duration::from_millis(200));
    assert!(report.flows[0].figures.causes.contains_key(&Cause::NoEndpoint), "{:?}", report.flows[0]);
    assert!(report.flows[1].figures.causes.contains_key(&Cause::Refused), "{:?}", report.flows[1]);
    for host in ["b", "c"] {
        meter.bind(place("b"), lan.endpoint(host));
        thread::sleep(Duration::from_millis(200));
        meter.reset().unwrap();
        let report = run(&meter, Duration::from_millis(300));
        assert_eq!(report.flows[0].figures.lost, 0, "{:?}", report.flows[0]);
    }
}

#[test]
fn a_pod_that_is_replaced_costs_its_long_lived_connections() {
    let lan = Lan::new();
    let _echo = (lan.echo("b"), lan.echo("c"));
    let meter = lan.start(vec![stream("a", "b")], None);
    meter.bind(place("b"), lan.endpoint("b"));
    assert_eq!(run(&meter, Duration::from_millis(200)).reconnects(), 0, "the same place again is no change");
    meter.bind(place("b"), lan.endpoint("c"));
    let report = run(&meter, Duration::from_millis(500));
    assert_eq!(report.reconnects(), 1, "{}", report.table());
    assert!(report.lost() < 10, "{}", report.table());
}

/// The rate the prober must reach: 60 flows, one probe each every 10 ms.
#[test]
fn sixty_flows_at_ten_milliseconds_are_kept_up_with() {
    let lan = Lan::new();
    let _echo = lan.echo("b");
    let (flows, observer) = every_method(&lan);
    let many = flows.iter().cycle().take(60).cloned().collect();
    let meter = lan.start(many, Some(observer));
    thread::sleep(Duration::from_secs(5));
    let report = meter.stop().unwrap();
    println!("{}", report.table());
    assert_eq!(report.lost(), 0, "{}", report.table());
    let sent: u64 = report.flows.iter().map(|flow| flow.figures.sent).sum();
    let due = report.prober.ticks * 12;
    assert!(sent * 100 >= due * 95, "{sent} of {due} probes sent: {}", report.table());
}
