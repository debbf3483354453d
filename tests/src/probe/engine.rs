//! The prober's one thread: sends what is due, reads what has come, keeps the accounts.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::flow::{Flow, Method, Place};
use super::ledger::{Counts, Ledger};
use super::link::{Bench, Ends, Link, Number, Verdict};
use super::netns::{Here, Netns};
use super::schedule::{Due, Resolution, Schedule};

/// Where a place is at present. A place without an address is only a source.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its network namespace.
    pub netns: Arc<Netns>,
    /// Its address.
    pub address: Option<IpAddr>,
}

/// What the thread is asked to do.
pub(super) enum Command {
    Bind(Place, Endpoint),
    Count(Sender<Tally>),
    Reset(Sender<()>),
    Stop(Sender<Tally>),
}

/// All accounts at one moment.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    pub(super) flows: Vec<(Flow, Counts)>,
    pub(super) resolution: Resolution,
    pub(super) counted: Duration,
}

struct Runner {
    flow: Flow,
    group: u64,
    ledger: Ledger,
    link: Link,
}

/// Everything the thread works with.
pub(super) struct Engine {
    commands: Receiver<Command>,
    bench: Bench,
    runners: Vec<Runner>,
    places: HashMap<Place, Endpoint>,
    observer: Option<UdpSocket>,
    timer: TimerFd,
    schedule: Schedule,
    timeout: Duration,
    origin: Instant,
    counted_from: Duration,
    cpu_from: Duration,
    resolution: Resolution,
}

const TIMER: u64 = u64::MAX;
const OBSERVER: u64 = u64::MAX - 1;

impl Engine {
    /// Prepares the thread's work; `observer` is the socket of the server outside, already bound there.
    pub(super) fn new(
        flows: Vec<Flow>,
        observer: Option<UdpSocket>,
        (interval, timeout): (Duration, Duration),
        commands: Receiver<Command>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        if let Some(observer) = &observer {
            observer.set_nonblocking(true)?;
            epoll.add(observer, EpollEvent::new(EpollFlags::EPOLLIN, OBSERVER))?;
        }
        let schedule = Schedule::new(interval);
        let runners = flows
            .into_iter()
            .enumerate()
            .map(|(index, flow)| Runner {
                group: schedule.group_of(index),
                ledger: Ledger::new(Duration::ZERO),
                link: Link::new(Number(u32::try_from(index).unwrap_or(u32::MAX)), flow.method),
                flow,
            })
            .collect();
        Ok(Self {
            commands,
            bench: Bench { epoll, here: Here::default(), run: run_number() },
            runners,
            places: HashMap::new(),
            observer,
            timer,
            schedule,
            timeout,
            origin: Instant::now(),
            counted_from: Duration::ZERO,
            cpu_from: Duration::ZERO,
            resolution: Resolution::default(),
        })
    }

    /// Runs until told to stop, or until nobody is left to tell.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.resolution.realtime = take_priority();
        self.cpu_from = cpu_time();
        self.origin = Instant::now();
        let step = TimeSpec::from_duration(self.schedule.step());
        self.timer.set(Expiration::IntervalDelayed(step, step), TimerSetTimeFlags::empty())?;
        loop {
            self.read_all()?;
            let now = self.now();
            if let Some(due) = self.schedule.take(now) {
                self.note(&due);
                for runner in &mut self.runners {
                    let Runner { ledger, link, .. } = runner;
                    ledger.expire(now, |sequence| link.forget(sequence));
                }
                self.send(&due.groups);
            }
            loop {
                match self.commands.try_recv() {
                    Ok(Command::Stop(answer)) => {
                        let _ = answer.send(self.finish()?);
                        return Ok(());
                    }
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return Ok(()),
                }
            }
        }
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Waits for something to happen and reads until nothing is left, so that no probe is given up whose answer is here.
    fn read_all(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 128];
        let mut wait = 100_u16;
        loop {
            let count = match self.bench.epoll.wait(&mut events, wait) {
                Err(nix::errno::Errno::EINTR) => return Ok(()),
                count => count?,
            };
            if count == 0 {
                return Ok(());
            }
            wait = 0;
            for event in events.iter().take(count) {
                match event.data() {
                    TIMER => {
                        let _ = self.timer.wait();
                    }
                    OBSERVER => self.observe(),
                    token => self.read(token),
                }
            }
        }
    }

    fn read(&mut self, token: u64) {
        let (index, sequence) = Number::of(token);
        let now = self.origin.elapsed();
        let Some(runner) = self.runners.get_mut(index) else { return };
        let mut verdicts: Vec<Verdict> = Vec::new();
        if runner.link.read(&self.bench, sequence, &mut verdicts) {
            runner.ledger.reconnect();
        }
        for (sequence, verdict) in verdicts {
            match verdict {
                Ok(()) => runner.ledger.answer(sequence, now),
                Err(cause) => runner.ledger.lose(sequence, cause),
            }
        }
    }

    /// The server outside: answers each datagram with itself and the source it came from.
    fn observe(&self) {
        let Some(observer) = &self.observer else { return };
        let mut buffer = [0; 256];
        while let Ok((length, source)) = observer.recv_from(&mut buffer) {
            let mut answer = buffer.get(..length).unwrap_or_default().to_vec();
            // A socket of both families tells IPv4 addresses as mapped ones.
            answer.extend_from_slice(source.ip().to_canonical().to_string().as_bytes());
            // A full buffer or no route back: the probe times out, and says so.
            let _ = observer.send_to(&answer, source);
        }
    }

    fn note(&mut self, due: &Due) {
        self.resolution.ticks += (due.groups.len() + due.skipped.len()) as u64;
        self.resolution.late_ticks += due.late;
        for group in &due.skipped {
            self.resolution.skipped_probes +=
                self.runners.iter().filter(|runner| runner.group == *group).count() as u64;
        }
        let late_ms = due.lateness.as_secs_f64() * 1000.0;
        self.resolution.max_late_ms = self.resolution.max_late_ms.max(late_ms);
        if due.lateness > self.schedule.step() * 2 {
            for runner in &mut self.runners {
                runner.ledger.defer(due.lateness);
            }
        }
    }

    fn send(&mut self, groups: &[u64]) {
        for runner in self.runners.iter_mut().filter(|runner| groups.contains(&runner.group)) {
            let now = self.origin.elapsed();
            let sequence = runner.ledger.send(now, self.timeout);
            if let Err(cause) = runner.link.send(&mut self.bench, sequence, now) {
                runner.ledger.lose(sequence, cause);
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Bind(place, endpoint) => self.bind(&place, endpoint),
            Command::Count(answer) => {
                let _ = answer.send(self.tally());
            }
            Command::Reset(answer) => {
                self.reset();
                let _ = answer.send(());
            }
            Command::Stop(_) => {}
        }
    }

    fn bind(&mut self, place: &Place, endpoint: Endpoint) {
        self.places.insert(place.clone(), endpoint);
        for runner in &mut self.runners {
            if runner.flow.from != *place && runner.flow.to != *place {
                continue;
            }
            if let Some(ends) = ends(&self.places, &runner.flow)
                && runner.link.bind(ends)
            {
                runner.ledger.reconnect();
            }
        }
    }

    fn reset(&mut self) {
        let now = self.now();
        for runner in &mut self.runners {
            runner.ledger.reset(now);
            runner.link.forget_all();
        }
        self.resolution = Resolution { realtime: self.resolution.realtime, ..Resolution::default() };
        self.counted_from = now;
        self.cpu_from = cpu_time();
    }

    fn tally(&self) -> Tally {
        let now = self.now();
        let counted = now.saturating_sub(self.counted_from);
        let mut resolution = self.resolution.clone();
        let cpu = cpu_time().saturating_sub(self.cpu_from);
        resolution.cpu_percent = 100.0 * cpu.as_secs_f64() / counted.as_secs_f64().max(f64::EPSILON);
        let flows =
            self.runners.iter().map(|runner| (runner.flow.clone(), runner.ledger.counts(now))).collect();
        Tally { flows, resolution, counted }
    }

    /// Sends no more, and waits for what is under way.
    fn finish(&mut self) -> io::Result<Tally> {
        let until = self.now() + self.timeout;
        while self.runners.iter().any(|runner| runner.ledger.is_waiting()) {
            self.read_all()?;
            let now = self.now();
            if now > until {
                for runner in &mut self.runners {
                    runner.ledger.expire(now, |_| ());
                }
                break;
            }
        }
        Ok(self.tally())
    }
}

/// The present ends of a flow, once both are known.
fn ends(places: &HashMap<Place, Endpoint>, flow: &Flow) -> Option<Ends> {
    let from = Arc::clone(&places.get(&flow.from)?.netns);
    let to = match &flow.to {
        Place::Address(address) => *address,
        place => {
            let port = if let Method::Stream(port) = flow.method { port } else { 0 };
            SocketAddr::new(places.get(place)?.address?, port)
        }
    };
    Some(Ends { from, to })
}

/// A number that tells this run's packets from those of any other.
fn run_number() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

/// Processor time used by the calling thread.
fn cpu_time() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_or(Duration::ZERO, Duration::from)
}

/// Asks for real-time priority, so that a busy machine delays the cluster's packets but not the measurement of them.
fn take_priority() -> bool {
    use thread_priority::{
        RealtimeThreadSchedulePolicy, ThreadPriority, ThreadPriorityValue, ThreadSchedulePolicy,
        set_thread_priority_and_policy, thread_native_id,
    };
    let Ok(priority) = ThreadPriorityValue::try_from(10_u8) else { return false };
    set_thread_priority_and_policy(
        thread_native_id(),
        ThreadPriority::Crossplatform(priority),
        ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::Fifo),
    )
    .is_ok()
}
