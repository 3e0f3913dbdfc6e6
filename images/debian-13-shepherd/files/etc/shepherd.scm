;; What the Shepherd does as process 1: first the boot script, then its services.
(setenv "PATH" "/usr/sbin:/usr/bin:/sbin:/bin")
(system* "/etc/rc.boot")
