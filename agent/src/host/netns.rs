//! Work inside another network namespace.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};

/// The kernel does one change at a time all the same; what is gained is the time in between.
const MOST_THREADS: usize = 4;

/// A namespace that couldn't be entered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file that stands for it can't be opened.
    #[error("can't open the network namespace {0}")]
    Open(String, #[source] std::io::Error),
    /// The file isn't a network namespace, or this process may not enter it.
    #[error("can't enter the network namespace {0}")]
    Enter(String, #[source] nix::errno::Errno),
    /// The thread that was to work there could not be started, or died.
    #[error("a thread for the network namespace failed: {0}")]
    Thread(String),
}

/// Runs `work` inside the namespace, on a thread of its own: a thread that has changed its namespace must not
/// go back to a pool.
pub fn run<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let name = || netns.display().to_string();
    let file = File::open(netns).map_err(|error| Error::Open(name(), error))?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, move || setns(&file, CloneFlags::CLONE_NEWNET).map(|()| work()))
            .map_err(|_| Error::Thread(name()))?;
        thread.join().map_err(|_| Error::Thread(name()))?.map_err(|error| Error::Enter(name(), error))
    })
}

/// Does `work` for each item inside its namespace; on a few threads, each of which goes from namespace to namespace. The first error is
/// the result, though all of the other threads' work is done. An item without a namespace is passed over.
pub fn each<I: Sync, E: From<Error> + Send>(
    items: &[I],
    netns: impl Fn(&I) -> Option<PathBuf> + Sync,
    work: impl Fn(&I) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    let (netns, work) = (&netns, &work);
    let go = move |items: &[I]| {
        for item in items {
            let Some(path) = netns(item) else { continue };
            let name = || path.display().to_string();
            let file = File::open(&path).map_err(|error| Error::Open(name(), error))?;
            setns(&file, CloneFlags::CLONE_NEWNET).map_err(|error| Error::Enter(name(), error))?;
            work(item)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let mut started = Vec::new();
        let mut result = Ok(());
        for items in items.chunks(items.len().div_ceil(threads).max(1)) {
            match std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, move || go(items)) {
                Ok(thread) => started.push(thread),
                Err(error) => result = Err(Error::Thread(error.to_string()).into()),
            }
        }
        for thread in started {
            let done = thread.join().unwrap_or_else(|_| Err(Error::Thread("of some pods".into()).into()));
            result = result.and(done);
        }
        result
    })
}

/// Number that identifies the namespace behind a file such as `/proc/<pid>/ns/net`; `None` when it is gone.
#[must_use]
pub fn number(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|metadata| metadata.ino())
}

/// Number of the calling thread's namespace.
#[must_use]
pub fn own() -> Option<u64> {
    number(Path::new("/proc/thread-self/ns/net"))
}

/// Runtimes write paths below /var/run, which is /run on the host but need not be inside a container.
#[must_use]
pub fn host_path(path: &str) -> PathBuf {
    path.strip_prefix("/var/run/").map_or_else(|| PathBuf::from(path), |rest| Path::new("/run").join(rest))
}
