//! The API server on a loopback port of the machine: `kubectl` and tests reach it without any route into the
//! test bed's networks.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    path::Path,
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

use super::{
    Bed,
    cgroup::Cgroup,
    control,
    daemon::{Daemon, Place},
    layout::API_PORT,
};
use crate::run;

/// Starts `program forward NAMESPACE PORT_FILE` and returns the port that it got.
pub fn start(bed: &Bed, program: &Path) -> Result<u16> {
    let port_file = bed.plan.directory().join("port");
    let _ = fs::remove_file(&port_file);
    let cgroup = Cgroup::of(&bed.plan.bed, Some("machine"));
    cgroup.create()?;
    let daemon =
        Daemon { name: "forward".to_owned(), directory: bed.plan.directory(), place: Place::Machine, cgroup };
    let namespace = bed.plan.netns_path(control::PART).display().to_string();
    daemon.start(program, &["forward".to_owned(), namespace, port_file.display().to_string()])?;
    let mut port = 0;
    run::wait_for("the way to the API server opens", Duration::from_mins(1), || {
        port = fs::read_to_string(&port_file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        Ok(port != 0)
    })?;
    Ok(port)
}

/// Forwards connections to a free loopback port, written to `port_file`, to the API server in the network
/// namespace at `namespace`. Returns only with an error.
pub fn serve(namespace: &Path, port_file: &Path) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no loopback port")?;
    let unfinished = port_file.with_extension("new");
    fs::write(&unfinished, listener.local_addr()?.port().to_string())?;
    fs::rename(&unfinished, port_file)?;
    let inside = File::open(namespace).with_context(|| format!("no namespace {}", namespace.display()))?;
    let (sender, accepted) = mpsc::channel::<TcpStream>();
    // A namespace belongs to a thread: this one only ever opens connections inside.
    let connector = thread::spawn(move || -> Result<()> {
        setns(&inside, CloneFlags::CLONE_NEWNET)?;
        for client in accepted {
            // The API server may be down for a while: then this client is refused, the next is tried again.
            if let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, API_PORT)) {
                join(client, server);
            }
        }
        Ok(())
    });
    for client in listener.incoming() {
        if sender.send(client?).is_err() {
            break;
        }
    }
    match connector.join() {
        Ok(result) => result,
        Err(_) => anyhow::bail!("the connecting thread ended"),
    }
}

fn join(client: TcpStream, server: TcpStream) {
    // Else a request in two parts waits for the acknowledgement of the first.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let pair = || -> io::Result<_> { Ok((client.try_clone()?, server.try_clone()?)) };
    let Ok((client_too, server_too)) = pair() else { return };
    thread::spawn(move || copy(client, server));
    thread::spawn(move || copy(server_too, client_too));
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    // However it ends, the other side learns that nothing more will come.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}
