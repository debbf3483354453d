//! A TCP connection that is held: one record out each tick, the same record back.

use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

use socket2::{Protocol, Socket, Type};

use super::ledger::Cause;
use super::link::{Bench, Ends, Number, cause, start_connect};
use super::packet::{RECORD, Record};

/// How long one attempt to connect may take before a new one.
const ATTEMPT: Duration = Duration::from_secs(1);
/// Time between attempts that fail at once.
const PAUSE: Duration = Duration::from_millis(100);
/// Room for the records of a connection that hangs.
const SEND_BUFFER: usize = 1 << 20;

/// The connection of one flow. It is kept however long it hangs, as an application would: only the kernel's word that it
/// is broken, or the other pod's replacement, ends it.
#[derive(Default)]
pub(super) struct Stream {
    state: State,
    received: Vec<u8>,
    /// The rest of a record that didn't fit into the send buffer: it goes before all that follow.
    unsent: Vec<u8>,
    next_attempt: Duration,
}

#[derive(Default)]
enum State {
    #[default]
    Closed,
    Connecting(Socket, Duration),
    Established(Socket),
}

impl Stream {
    /// Sends one record if the connection stands; otherwise sees to it that one is being opened.
    pub(super) fn send(
        &mut self,
        bench: &mut Bench,
        ends: &Ends,
        number: Number,
        record: Record,
        now: Duration,
    ) -> Result<(), Cause> {
        match &self.state {
            State::Established(socket) => {
                let mut socket = socket;
                while !self.unsent.is_empty() {
                    // A broken connection is told by reading, where it is counted.
                    let length = socket.write(&self.unsent).map_err(|error| cause(&error))?;
                    self.unsent.drain(..length);
                }
                let bytes = record.encode();
                let length = socket.write(&bytes).map_err(|error| cause(&error))?;
                self.unsent.extend_from_slice(bytes.get(length..).unwrap_or_default());
                Ok(())
            }
            State::Connecting(_, until) if *until > now => Err(Cause::Disconnected),
            State::Closed if self.next_attempt > now => Err(Cause::Disconnected),
            State::Connecting(..) | State::Closed => {
                self.attempt(bench, ends, number, now);
                Err(Cause::Disconnected)
            }
        }
    }

    fn attempt(&mut self, bench: &mut Bench, ends: &Ends, number: Number, now: Duration) {
        self.received.clear();
        self.unsent.clear();
        self.next_attempt = now + PAUSE;
        let opened = bench.open(ends, Type::STREAM, Protocol::TCP).and_then(|socket| {
            socket.set_tcp_nodelay(true)?;
            socket.set_send_buffer_size(SEND_BUFFER)?;
            start_connect(&socket, ends.to)?;
            bench.watch(&socket, number.token(0))?;
            Ok(socket)
        });
        self.state = opened.map_or(State::Closed, |socket| State::Connecting(socket, now + ATTEMPT));
    }

    /// Reads all echoed records; true when an established connection broke.
    pub(super) fn read(&mut self, mut echoed: impl FnMut(Record)) -> bool {
        match std::mem::take(&mut self.state) {
            State::Connecting(socket, until) => {
                self.state = match (socket.take_error(), socket.peer_addr()) {
                    (Ok(None), Ok(_)) => State::Established(socket),
                    (Ok(None), Err(_)) => State::Connecting(socket, until),
                    _ => State::Closed,
                };
                false
            }
            other => {
                self.state = other;
                self.read_established(&mut echoed)
            }
        }
    }

    fn read_established(&mut self, echoed: &mut impl FnMut(Record)) -> bool {
        let State::Established(socket) = &self.state else { return false };
        let mut buffer = [0; 4096];
        let mut socket = socket;
        let broken = loop {
            match socket.read(&mut buffer) {
                Ok(0) => break true,
                Ok(length) => self.received.extend_from_slice(buffer.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break true,
            }
        };
        let whole = self.received.len() - self.received.len() % RECORD;
        self.received
            .drain(..whole)
            .as_slice()
            .chunks_exact(RECORD)
            .filter_map(Record::decode)
            .for_each(echoed);
        if broken {
            self.state = State::Closed;
        }
        broken
    }

    /// Gives the connection up; true when it was established.
    pub(super) fn close(&mut self) -> bool {
        self.next_attempt = Duration::ZERO;
        matches!(std::mem::take(&mut self.state), State::Established(_))
    }
}
