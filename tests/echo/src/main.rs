//! What the prober's pods run: a TCP echo for long-lived connections, and an HTTP answer of one line with the host's name.
//!
//! `ECHO_PORT` (7) and `HTTP_PORT` (8080) set the ports. After SIGTERM it goes on
//! serving for a moment, as a well-behaved server does: the nodes hear of its leaving later than itself.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

/// Threads are many and do next to nothing.
const STACK: usize = 64 * 1024;

/// How long new connections may still come after SIGTERM: kube-proxy must have heard on every node, with a loaded
/// machine's delays.
const FAREWELL: Duration = Duration::from_millis(1500);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("echo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    // Blocked and waited for: process 1 doesn't get signals whose action is the default one.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    serve(port("ECHO_PORT", 7)?, echo)?;
    serve(port("HTTP_PORT", 8080)?, answer)?;
    signals.wait()?;
    thread::sleep(FAREWELL);
    Ok(())
}

fn port(variable: &str, default: u16) -> io::Result<u16> {
    match std::env::var(variable) {
        Ok(text) => text.parse().map_err(|_| io::Error::other(format!("{variable}={text} is not a port"))),
        Err(_) => Ok(default),
    }
}

/// Listens, and hands each connection to a thread of its own.
fn serve(port: u16, handle: fn(TcpStream) -> io::Result<()>) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind(("0.0.0.0", port)))
        .map_err(|error| io::Error::other(format!("can't listen on port {port}: {error}")))?;
    thread::Builder::new().stack_size(STACK).spawn(move || {
        for stream in listener.incoming().flatten() {
            // A connection that fails is its client's to notice.
            let _ = thread::Builder::new().stack_size(STACK).spawn(move || handle(stream));
        }
    })?;
    Ok(())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 4096];
    loop {
        let length = stream.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else { return Ok(()) };
        stream.write_all(bytes)?;
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    // Whatever is asked, the answer is the same.
    if stream.read(&mut [0; 1024])? == 0 {
        return Ok(());
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    let name = name.trim();
    let length = name.len() + 1;
    let text = format!(
        "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{name}\n"
    );
    stream.write_all(text.as_bytes())
}
