//! A blocking rtnetlink socket with what a switch needs and an asynchronous one lacks: many requests in one system call,
//! in order, and a socket that belongs to a pod's namespace while any thread may use it.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{Socket as RawSocket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::host::netns;

// The kernel answers before send returns; only a lost answer would make us wait.
const ANSWER: Duration = Duration::from_secs(5);
// Answers of a batch wait in the receive buffer (about 1 KiB of accounting each, 200 KiB by default).
const BATCH: usize = 64;

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("netlink: can't {0}")]
    Socket(&'static str, #[source] std::io::Error),
    /// The kernel's answer can't be read.
    #[error("netlink: the kernel's answer can't be read: {0}")]
    Answer(String),
    /// The namespace of the socket can't be entered.
    #[error("netlink: no socket in the namespace")]
    Netns(#[source] netns::Error),
    /// The kernel refused one request.
    #[error("can't {what}")]
    Refused {
        /// What was asked for.
        what: String,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// The kernel's error number, if it was the kernel that refused.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// One change, in words and as the kernel wants it.
#[derive(Clone, Debug)]
pub struct Request {
    /// For errors and logs: "rename flannel.1 to vxlan.calico".
    pub what: String,
    /// The message.
    pub message: RouteNetlinkMessage,
    /// `NLM_F_*` beyond request and acknowledgement.
    pub flags: u16,
    /// Error numbers that mean that what was wanted is already so.
    pub accept: &'static [i32],
}

/// A socket in one network namespace.
pub struct Socket {
    raw: RawSocket,
    sequence: u32,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "netlink::Socket({})", self.raw.as_raw_fd())
    }
}

impl Socket {
    /// Opens a socket in the calling thread's namespace.
    pub fn open() -> Result<Self, Error> {
        let mut raw = RawSocket::new(NETLINK_ROUTE).map_err(|error| Error::Socket("open a socket", error))?;
        raw.bind_auto().map_err(|error| Error::Socket("bind a socket", error))?;
        raw.connect(&SocketAddr::new(0, 0)).map_err(|error| Error::Socket("connect a socket", error))?;
        // Answers without a copy of the request: a batch's answers must fit the receive buffer.
        raw.set_cap_ack(true).map_err(|error| Error::Socket("set a socket's option", error))?;
        socket2::SockRef::from(&raw)
            .set_read_timeout(Some(ANSWER))
            .map_err(|error| Error::Socket("set a socket's time limit", error))?;
        Ok(Self { raw, sequence: 0 })
    }

    /// Opens a socket in another namespace; it can then be used from anywhere.
    pub fn open_in(netns: &Path) -> Result<Self, Error> {
        netns::run(netns, Self::open).map_err(Error::Netns)?
    }

    /// All objects of a kind.
    pub fn dump(&mut self, request: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let sequence = self.send(vec![(request, NLM_F_DUMP)])?;
        let mut found = Vec::new();
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) => {
                        return Err(Error::Refused { what: "list".into(), source: error.to_io() });
                    }
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    _ => {}
                }
            }
        }
    }

    /// Makes changes back to back, in as few system calls as possible. All are tried; the failures are returned.
    pub fn batch(&mut self, requests: &[Request]) -> Result<Vec<Error>, Error> {
        let mut failures = Vec::new();
        for requests in requests.chunks(BATCH) {
            // The kernel works in order, and tells each failure: that the last is done is all that needs to be asked for.
            let messages = (1..).zip(requests).map(|(number, request)| {
                let asked = if number == requests.len() { NLM_F_ACK } else { 0 };
                (request.message.clone(), request.flags | asked)
            });
            let last = self.send(messages.collect())?;
            let first = last.wrapping_sub(u32::try_from(requests.len()).unwrap_or(0)).wrapping_add(1);
            let mut answered = false;
            while !answered {
                for message in self.receive()? {
                    let offset = message.header.sequence_number.wrapping_sub(first);
                    let Some(request) = usize::try_from(offset).ok().and_then(|offset| requests.get(offset))
                    else {
                        continue;
                    };
                    if let NetlinkPayload::Error(error) = message.payload {
                        answered = message.header.sequence_number == last;
                        let number = error.raw_code().abs();
                        if number != 0 && !request.accept.contains(&number) {
                            failures
                                .push(Error::Refused { what: request.what.clone(), source: error.to_io() });
                        }
                    }
                }
            }
        }
        Ok(failures)
    }

    /// Makes changes back to back; the first failure is the result, though all were tried.
    pub fn apply(&mut self, requests: &[Request]) -> Result<(), Error> {
        self.batch(requests)?.into_iter().next().map_or(Ok(()), Err)
    }

    // Returns the sequence number of the last message; the others' are just before it.
    fn send(&mut self, messages: Vec<(RouteNetlinkMessage, u16)>) -> Result<u32, Error> {
        let mut bytes = Vec::new();
        for (message, flags) in messages {
            self.sequence = self.sequence.wrapping_add(1);
            let mut message = NetlinkMessage::from(message);
            message.header.flags = NLM_F_REQUEST | flags;
            message.header.sequence_number = self.sequence;
            message.finalize();
            let mut buffer = vec![0; message.buffer_len()];
            message.serialize(&mut buffer);
            buffer.resize(buffer.len().next_multiple_of(4), 0);
            bytes.extend(buffer);
        }
        self.raw.send(&bytes, 0).map_err(|error| Error::Socket("send", error))?;
        Ok(self.sequence)
    }

    fn receive(&mut self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, Error> {
        let (datagram, _) = self.raw.recv_from_full().map_err(|error| Error::Socket("receive", error))?;
        let mut messages = Vec::new();
        let mut rest = datagram.as_slice();
        while rest.len() >= 16 {
            let length =
                NetlinkBuffer::new_checked(rest).map_err(|error| Error::Answer(error.to_string()))?.length();
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let message =
                NetlinkMessage::deserialize(rest).map_err(|error| Error::Answer(error.to_string()))?;
            messages.push(message);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(messages)
    }
}
