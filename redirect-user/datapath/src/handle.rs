//! The datapath thread. Entering a network namespace moves a whole thread, so this must not be a runtime thread; and one thread
//! runs one job at a time, without locks.

use std::io;
use std::thread;

use tokio::sync::{mpsc, oneshot};

use super::datapath::Datapath;

type Job<D> = Box<dyn FnOnce(&mut D) + Send>;

/// Sends jobs to the datapath thread, which ends when the last handle is dropped.
#[derive(Debug)]
pub struct DatapathHandle<D> {
    jobs: mpsc::Sender<Job<D>>,
}

impl<D> Clone for DatapathHandle<D> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone() }
    }
}

/// The datapath thread has ended, so the agent ends too.
#[derive(Debug, thiserror::Error)]
#[error("the datapath thread has ended; restart the agent")]
pub struct Gone;

/// The queue's capacity. Callers wait while it is full.
const QUEUE: usize = 64;

impl<D: Datapath + 'static> DatapathHandle<D> {
    /// Starts the thread. `load` creates the datapath on it.
    pub fn start<E: Send + 'static>(
        load: impl FnOnce() -> Result<D, E> + Send + 'static,
    ) -> io::Result<(Self, oneshot::Receiver<Result<(), E>>)> {
        let (jobs, mut queue) = mpsc::channel::<Job<D>>(QUEUE);
        let (loaded, result) = oneshot::channel();
        thread::Builder::new().name("datapath".into()).spawn(move || {
            let mut datapath = match load() {
                Ok(datapath) => datapath,
                Err(error) => {
                    let _ = loaded.send(Err(error));
                    return;
                }
            };
            let _ = loaded.send(Ok(()));
            while let Some(job) = queue.blocking_recv() {
                job(&mut datapath);
                datapath.rest();
            }
        })?;
        Ok((Self { jobs }, result))
    }

    /// Runs `work` on the thread, after earlier jobs.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut D) -> T + Send + 'static,
    ) -> Result<T, Gone> {
        let (done, result) = oneshot::channel();
        let job: Job<D> = Box::new(move |datapath| {
            let _ = done.send(work(datapath));
        });
        self.jobs.send(job).await.map_err(|_| Gone)?;
        result.await.map_err(|_| Gone)
    }
}
