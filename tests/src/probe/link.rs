//! How the probes of one flow are sent and their answers read: one [`Link`] a flow, sockets only, no accounting.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::flow::Method;
use super::ledger::Cause;
use super::netns::{Here, Netns};
use super::packet::{RECORD, Record, decode_echo_reply, decode_echo_reply_v6, encode_echo};
use super::stream::Stream;

/// Room for what a socket receives while the prober does not run.
const RECEIVE_BUFFER: usize = 1 << 20;
/// What the prober sends to a Service.
const REQUEST: &[u8] = b"GET / HTTP/1.0\r\n\r\n";

/// What a probe came to.
pub(super) type Verdict = (u64, Result<(), Cause>);

/// What all links of one engine share.
pub(super) struct Bench {
    pub(super) epoll: Epoll,
    pub(super) here: Here,
    pub(super) run: u64,
}

/// A flow's number, from which come its ICMP identifier and the tokens of its sockets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Number(pub(super) u32);

impl Number {
    /// The token of a flow's socket: the flow's number above, the probe's sequence number (0 for a socket that serves all) below.
    pub(super) fn token(self, sequence: u64) -> u64 {
        (u64::from(self.0) << 40) | (sequence & 0xff_ffff_ffff)
    }

    /// The flow and sequence number of a token.
    pub(super) fn of(token: u64) -> (usize, u64) {
        (usize::try_from(token >> 40).unwrap_or(usize::MAX), token & 0xff_ffff_ffff)
    }

    fn identifier(self, run: u64) -> u16 {
        let [_, _, _, _, _, _, high, low] = (run ^ u64::from(self.0)).to_be_bytes();
        u16::from_be_bytes([high, low])
    }
}

/// From where and to where a flow goes at present.
#[derive(Clone, Debug)]
pub(super) struct Ends {
    pub(super) from: Arc<Netns>,
    pub(super) to: SocketAddr,
}

impl PartialEq for Ends {
    fn eq(&self, other: &Self) -> bool {
        self.from == other.from && self.to == other.to
    }
}

/// The sockets of one flow.
pub(super) struct Link {
    number: Number,
    method: Method,
    ends: Option<Ends>,
    sockets: Sockets,
}

enum Sockets {
    /// One raw socket for all probes, opened with the first.
    Ping(Option<Socket>),
    /// A socket for each probe under way.
    Each(HashMap<u64, Exchange>),
    Stream(Stream),
}

struct Exchange {
    socket: Socket,
    asked: bool,
    answer: Vec<u8>,
}

impl Bench {
    /// Reports every change of a socket that connects, sends and reads.
    pub(super) fn watch(&self, socket: &Socket, token: u64) -> io::Result<()> {
        self.watch_for(socket, token, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP)
    }

    fn watch_for(&self, socket: &Socket, token: u64, flags: EpollFlags) -> io::Result<()> {
        Ok(self.epoll.add(socket, EpollEvent::new(flags | EpollFlags::EPOLLET, token))?)
    }

    pub(super) fn open(&mut self, ends: &Ends, kind: Type, protocol: Protocol) -> io::Result<Socket> {
        self.here.enter(&ends.from)?;
        let socket = Socket::new(Domain::for_address(ends.to), kind, Some(protocol))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }
}

impl Link {
    pub(super) fn new(number: Number, method: Method) -> Self {
        let sockets = match method {
            Method::Ping => Sockets::Ping(None),
            Method::Connect | Method::Observe(_) => Sockets::Each(HashMap::new()),
            Method::Stream(_) => Sockets::Stream(Stream::default()),
        };
        Self { number, method, ends: None, sockets }
    }

    /// Points the flow at other ends. True when that cost an established connection.
    pub(super) fn bind(&mut self, ends: Ends) -> bool {
        if self.ends.as_ref() == Some(&ends) {
            return false;
        }
        self.ends = Some(ends);
        match &mut self.sockets {
            Sockets::Ping(socket) => {
                *socket = None;
                false
            }
            // Exchanges under way end as they may: they are probes of the old ends.
            Sockets::Each(_) => false,
            Sockets::Stream(stream) => stream.close(),
        }
    }

    pub(super) fn send(&mut self, bench: &mut Bench, sequence: u64, now: Duration) -> Result<(), Cause> {
        let Some(ends) = &self.ends else { return Err(Cause::NoEndpoint) };
        let record = Record { run: bench.run, flow: u64::from(self.number.0), sequence };
        match &mut self.sockets {
            Sockets::Ping(socket) => ping(bench, socket, ends, self.number, record),
            Sockets::Each(exchanges) => {
                let exchange = if self.method == Method::Connect {
                    connect(bench, ends, self.number.token(sequence))
                } else {
                    ask(bench, ends, self.number.token(sequence), record)
                };
                exchanges.insert(sequence, exchange.map_err(|error| cause(&error))?);
                Ok(())
            }
            Sockets::Stream(stream) => stream.send(bench, ends, self.number, record, now),
        }
    }

    /// Reads what a socket of this flow has; true when an established connection broke.
    pub(super) fn read(&mut self, bench: &Bench, sequence: u64, verdicts: &mut Vec<Verdict>) -> bool {
        let flow = u64::from(self.number.0);
        let ours = |record: &Record| record.run == bench.run && record.flow == flow;
        match &mut self.sockets {
            Sockets::Ping(Some(socket)) => {
                let identifier = self.number.identifier(bench.run);
                let v6 = self.ends.as_ref().is_some_and(|ends| ends.to.is_ipv6());
                let decode = if v6 { decode_echo_reply_v6 } else { decode_echo_reply };
                let mut packet = [0; 1500];
                while let Some(bytes) = receive(socket, &mut packet) {
                    let record = decode(bytes, identifier).filter(ours);
                    verdicts.extend(record.map(|record| (record.sequence, Ok(()))));
                }
                false
            }
            Sockets::Ping(None) => false,
            Sockets::Each(exchanges) => {
                if let Some(exchange) = exchanges.get_mut(&sequence)
                    && let Some(verdict) = exchange.advance(self.method)
                {
                    exchanges.remove(&sequence);
                    verdicts.push((sequence, verdict));
                }
                false
            }
            Sockets::Stream(stream) => stream.read(|record| {
                if ours(&record) {
                    verdicts.push((record.sequence, Ok(())));
                }
            }),
        }
    }

    /// Drops what a probe that is given up still holds.
    pub(super) fn forget(&mut self, sequence: u64) {
        if let Sockets::Each(exchanges) = &mut self.sockets {
            exchanges.remove(&sequence);
        }
    }

    /// Drops what all probes under way hold; a long-lived connection stays.
    pub(super) fn forget_all(&mut self) {
        if let Sockets::Each(exchanges) = &mut self.sockets {
            exchanges.clear();
        }
    }
}

fn ping(
    bench: &mut Bench,
    held: &mut Option<Socket>,
    ends: &Ends,
    number: Number,
    record: Record,
) -> Result<(), Cause> {
    let socket = match held {
        Some(socket) => socket,
        None => held.insert(open_ping(bench, ends, number).map_err(|error| cause(&error))?),
    };
    let packet = encode_echo(number.identifier(record.run), record, ends.to.is_ipv6());
    // Not connected: the source address is chosen anew for each packet, as for any new connection. A connected
    // socket of a host would keep the address of a device that is long gone.
    let target = SockAddr::from(SocketAddr::new(ends.to.ip(), 0));
    socket.send_to(&packet, &target).map(drop).map_err(|error| cause(&error))
}

fn open_ping(bench: &mut Bench, ends: &Ends, number: Number) -> io::Result<Socket> {
    let protocol = if ends.to.is_ipv6() { Protocol::ICMPV6 } else { Protocol::ICMPV4 };
    let socket = bench.open(ends, Type::RAW, protocol)?;
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    // Not for writing: every packet that leaves would wake the prober once more.
    bench.watch_for(&socket, number.token(0), EpollFlags::EPOLLIN)?;
    Ok(socket)
}

fn connect(bench: &mut Bench, ends: &Ends, token: u64) -> io::Result<Exchange> {
    let socket = bench.open(ends, Type::STREAM, Protocol::TCP)?;
    // Ended by a reset: thousands of connections in TIME_WAIT would fill the tables that the measured traffic uses.
    socket.set_linger(Some(Duration::ZERO))?;
    start_connect(&socket, ends.to)?;
    bench.watch(&socket, token)?;
    Ok(Exchange { socket, asked: false, answer: Vec::new() })
}

pub(super) fn start_connect(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    match socket.connect(&SockAddr::from(to)) {
        Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => Ok(()),
        other => other,
    }
}

fn ask(bench: &mut Bench, ends: &Ends, token: u64, record: Record) -> io::Result<Exchange> {
    let socket = bench.open(ends, Type::DGRAM, Protocol::UDP)?;
    socket.connect(&SockAddr::from(ends.to))?;
    bench.watch_for(&socket, token, EpollFlags::EPOLLIN)?;
    (&socket).write_all(&record.encode())?;
    Ok(Exchange { socket, asked: true, answer: Vec::new() })
}

impl Exchange {
    fn advance(&mut self, method: Method) -> Option<Result<(), Cause>> {
        if !self.asked {
            match self.socket.take_error() {
                Ok(None) => {}
                Ok(Some(error)) | Err(error) => return Some(Err(cause(&error))),
            }
            match (&self.socket).write(REQUEST) {
                Ok(_) => self.asked = true,
                Err(error) if is_not_yet(&error) => return None,
                Err(error) => return Some(Err(cause(&error))),
            }
        }
        let mut buffer = [0; 1024];
        loop {
            match (&self.socket).read(&mut buffer) {
                Ok(0) => return Some(Err(Cause::Reset)),
                Ok(length) => self.answer.extend_from_slice(buffer.get(..length).unwrap_or_default()),
                Err(error) if is_not_yet(&error) => return None,
                Err(error) => return Some(Err(cause(&error))),
            }
            let verdict = match method {
                Method::Observe(expected) => Some(judge_source(&self.answer, expected)),
                _ => judge_answer(&self.answer),
            };
            if verdict.is_some() {
                return verdict;
            }
        }
    }
}

/// Whether the server outside saw the node's address; its answer is the record and then that address as text.
fn judge_source(answer: &[u8], expected: IpAddr) -> Result<(), Cause> {
    let seen = answer.get(RECORD..).and_then(|text| std::str::from_utf8(text).ok()).map(str::parse::<IpAddr>);
    match seen {
        Some(Ok(seen)) if seen == expected => Ok(()),
        Some(Ok(_)) => Err(Cause::WrongSource),
        _ => Err(Cause::Malformed),
    }
}

/// Whether a Service's answer is whole: a success, and a body of one line. `None` while there is more to come.
fn judge_answer(answer: &[u8]) -> Option<Result<(), Cause>> {
    let text = std::str::from_utf8(answer).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    if !head.starts_with("HTTP/1.0 200") {
        return Some(Err(Cause::Malformed));
    }
    body.ends_with('\n').then_some(Ok(()))
}

fn receive<'a>(mut socket: &Socket, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    let length = socket.read(buffer).ok()?;
    buffer.get(..length)
}

fn is_not_yet(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected | ErrorKind::Interrupted)
}

pub(super) fn cause(error: &io::Error) -> Cause {
    match error.kind() {
        ErrorKind::ConnectionRefused => Cause::Refused,
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe => Cause::Reset,
        ErrorKind::WouldBlock => Cause::Blocked,
        ErrorKind::TimedOut => Cause::TimedOut,
        _ => Cause::Unreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_judged_when_it_is_whole() {
        for (answer, expected) in [
            ("", None),
            ("HTTP/1.0 200 OK\r\n", None),
            ("HTTP/1.0 200 OK\r\n\r\nweb-1", None),
            ("HTTP/1.0 200 OK\r\n\r\nweb-1\n", Some(Ok(()))),
            ("HTTP/1.0 503 No\r\n\r\n", Some(Err(Cause::Malformed))),
        ] {
            assert_eq!(judge_answer(answer.as_bytes()), expected, "{answer:?}");
        }
    }

    #[test]
    fn only_the_nodes_own_address_is_the_right_source() {
        let node = IpAddr::from([10, 99, 0, 2]);
        let answer = |text: &str| [&[0; RECORD][..], text.as_bytes()].concat();
        assert_eq!(judge_source(&answer("10.99.0.2"), node), Ok(()));
        assert_eq!(judge_source(&answer("10.244.1.5"), node), Err(Cause::WrongSource));
        assert_eq!(judge_source(&answer(""), node), Err(Cause::Malformed));
    }

    #[test]
    fn a_token_names_its_flow_and_probe() {
        assert_eq!(Number::of(Number(61).token(123_456)), (61, 123_456));
    }

    #[test]
    fn flows_of_a_run_have_identifiers_of_their_own() {
        let identifiers: std::collections::BTreeSet<u16> =
            (0..1000).map(|number| Number(number).identifier(0x1234_5678)).collect();
        assert_eq!(identifiers.len(), 1000);
    }
}
