;; The services of this guest: one that brings it up, once.
(register-services
 (list
  (service '(boot)
    #:documentation "Bring this guest up."
    #:one-shot? #t
    #:start (lambda _ (zero? (status:exit-val (system* "/etc/rc.boot")))))))
(start-service (lookup-service 'boot))
